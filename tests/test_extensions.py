"""The tables of what goes beyond the paper, and the estimate of p(v), from toy records."""

import json
import math

import pandas as pd
import pytest
import torch
import yaml

from analysis import extensions, pages, prior
from mipruner.prior import visual_prior


def estimate(rows, size):
    """Kept tokens by seen tokens at each place, relative to everywhere; one token more that is kept as often as any."""
    kept, seen = ([[0.0] * size for _ in range(size)] for _ in range(2))
    for row in rows:
        for indices, grid in zip(row["kept"], row["grids"], strict=True):
            n_rows, n_columns = grid[-2:]
            for token in range(math.prod(grid)):
                r, c = token // n_columns % n_rows * size // n_rows, token % n_columns * size // n_columns
                seen[r][c] += 1
                kept[r][c] += token in indices
    share = sum(map(sum, kept)) / sum(map(sum, seen))
    return [
        [(k + share) / (s + 1) / share for k, s in zip(*pair, strict=True)] for pair in zip(kept, seen, strict=True)
    ]


@pytest.mark.parametrize("size", [1, 3, 4])
def test_estimate(size):
    rows = [
        {"kept": [[0, 5, 7]], "grids": [[3, 4]]},
        {"kept": [[1, 2], [60, 7]], "grids": [[2, 2], [3, 7, 5]]},
        {"prediction": None, "error": "broken image"},
    ]
    ours = prior.estimate(rows, size)
    torch.testing.assert_close(ours, torch.tensor(estimate(rows[:2], size)))
    assert (ours > 0).all()


def test_estimate_of_nothing_preferred_is_uniform():
    rows = [{"kept": [list(range(0, 64, 2))], "grids": [[8, 8]]}]
    torch.testing.assert_close(prior.estimate(rows, 2), torch.ones(2, 2))


def test_the_written_estimate_is_a_prior(tmp_path, monkeypatch):
    cell = tmp_path / "cell"
    cell.mkdir()
    (cell / "record.json").write_text(json.dumps({"command": "python run.py"}))
    (cell / "samples.jsonl").write_text(json.dumps({"kept": [[0, 1, 9]], "grids": [[16, 16]]}) + "\n")
    monkeypatch.setattr(prior, "CONF", tmp_path)
    monkeypatch.setattr("sys.argv", ["prior", str(cell), "--name", "toy"])
    prior.main()
    text = (tmp_path / "prior" / "toy.yaml").read_text()
    assert text.startswith("# @package pruner\n")
    config = yaml.safe_load(text)
    assert visual_prior(config["prior"], (16, 16), config["prior_table"]).argmax() in (0, 1)


def cell(keep, seed, accuracy, n_visual=576.0, **settings):
    used = {"support": "prompt", "lam": 0.5, "prior": "uniform", "vocabulary_rows": None, "seed": seed} | settings
    differs = {key for key, value in used.items() if value != {"support": "prompt", "lam": 0.5, "seed": 0}.get(key)}
    return {
        "model": "demo_llava",
        "dataset": "demo",
        "method": "mi",
        "keep": keep,
        "settings": used,
        "differs": differs - {"prior", "vocabulary_rows"},
        "metrics": {"accuracy": accuracy},
        "n_samples": 600,
        "n_visual": n_visual,
    }


def test_draws_are_one_number_and_the_best_is_bold():
    rows = [cell("8", seed, 90.0 + seed, lam=lam) for seed in range(3) for lam in (0.5, 0.8, 1)]
    rows += [cell("8", seed, 93.0 + seed, lam=lam, support="vocabulary") for seed in range(3) for lam in (0.5, 0.8, 1)]
    rows += [cell("8", 0, 1.0, tau=0.5), cell("16", 0, 50.0)]  # another experiment, and a budget without a partner
    table = extensions.support(pd.DataFrame(rows))
    assert "1,800 questions in 3 draws" in table
    (line,) = (line for line in table.splitlines() if line.startswith("| 8 "))
    assert line.count("91.0 ± 1.0") == 3 and line.count("**94.0 ± 1.0**") == 3
    assert "| 16 " not in table


def test_a_run_over_part_of_the_samples_is_never_shown():
    whole, part = cell("8", 0, 90.0), cell("8", 0, 10.0) | {"n_samples": 20}
    for rows in ([whole, part], [part, whole]):
        frame = pd.DataFrame(rows)
        (shown,) = extensions.select(frame, "demo_llava")["8"]
        assert shown.n_samples == 600
        default = frame.assign(differs=[set()] * 2)
        assert pages.demo_cells(default).n_samples.tolist() == [600]


def test_nothing_measured_is_no_table():
    frame = pd.DataFrame([cell("8", 0, 90.0)])
    assert extensions.support(frame) == extensions.prior(frame) == extensions.automatic(frame) == ""


def samples(correct, kept):
    return pd.DataFrame({"image_id": 0, "correct": correct, "kept": kept}, index=list("abcd"))


def test_a_fixed_budget_between_two_measured_ones():
    """Mean 4, halfway between 2 and 8 in log tokens; at a measured budget it is that budget."""
    fixed = {2: samples([0, 0, 1, 1], 2), 8: samples([1, 0, 1, 0], 8), 64: samples([1, 1, 1, 1], 64)}
    both = extensions.beside_fixed(samples([1, 1, 1, 1], [1, 3, 4, 8]), fixed)
    assert both.fixed.tolist() == pytest.approx([0.5, 0, 1, 0.5])
    assert extensions.beside_fixed(samples([1, 1, 1, 1], 8), fixed).fixed.tolist() == [1, 0, 1, 0]
    assert extensions.beside_fixed(samples([1, 1, 1, 1], 100), fixed).fixed.tolist() == [1, 1, 1, 1]


def test_auto_stands_beside_the_fixed_budget_of_its_mean(tmp_path):
    def write(name, keep, correct, kept, **settings):
        path = tmp_path / name
        path.mkdir()
        rows = zip("abcd", ("x", "x", "y", "y"), correct, kept, strict=True)
        lines = [json.dumps({"id": i, "image_id": p, "correct": c, "kept": [[0] * n]}) for i, p, c, n in rows]
        (path / "samples.jsonl").write_text("\n".join(lines))
        return cell(keep, 0, 0.0, **settings) | {"path": path}

    frame = pd.DataFrame(
        [
            write("two", "2", [0, 0, 1, 1], [2] * 4),
            write("eight", "8", [1, 0, 1, 0], [8] * 4),
            write("auto", "auto", [1, 1, 1, 0], [1, 3, 4, 8], quality=0.1),
        ]
    )
    (line,) = (line for line in extensions.automatic(frame).splitlines() if "quality" in line)
    assert line.split(" | ")[2:4] == ["75.0", "50.0"]
    assert "+25.0 ± 50.0" in line  # by image: (0.5 + 1) / 2 and (0 - 0.5) / 2, mean 0.25, deviation 0.707


def test_cover_is_compared_by_type_only_where_both_have_every_draw(tmp_path):
    def write(method, seed, correct):
        path = tmp_path / f"{method}{seed}"
        path.mkdir()
        rows = zip("abcd", "xxyy", ("gqa", "pope", "gqa", "pope"), correct, strict=True)
        lines = [json.dumps({"id": i, "image_id": image, "task": task, "correct": c}) for i, image, task, c in rows]
        (path / "samples.jsonl").write_text("\n".join(lines))
        return cell("8", seed, 25.0 * sum(correct)) | {
            "method": method,
            "path": path,
            "differs": set(),
            "settings": {"seed": seed},
        }

    rows = [write("cover", 0, [1, 1, 1, 1]), write("cover", 1, [1, 0, 1, 0])]
    rows += [write("mi", 0, [1, 0, 1, 0]), write("mi", 1, [0, 0, 0, 0]), write("random", 0, [0, 0, 0, 0])]
    table = extensions.cover(pd.DataFrame(rows))
    (line,) = (line for line in table.splitlines() if "keep" not in line and "demo LLaVA" in line)
    entries = line.strip("| ").split(" | ")
    assert entries[1:3] == ["25.0 ± 35.4", "75.0 ± 35.4"]
    assert [entry.split(" ± ")[0] for entry in entries[3:]] == ["+50.0", "+50.0", "+50.0"]
    assert [entry.split(" ± ")[1] for entry in entries[3:]] == ["0.0", "28.9", "28.9"]
    assert "3 contrasts" in table
    assert extensions.cover(pd.DataFrame(rows[2:])) == ""


def test_the_page_has_a_place_for_each_table():
    text = extensions.PAGE.read_text()
    for name in ("support", "sample", "prior", "auto", "cover"):
        assert f"<!-- begin {name} -->" in text and f"<!-- end {name} -->" in text


def test_a_page_is_refused_where_a_record_is_missing():
    frame = pd.DataFrame([{"method": name, "keep": keep} for name in ("mi", "random") for keep in pages.BUDGETS])
    pages.check_complete(frame, ["mi", "random"])
    with pytest.raises(ValueError, match=r"no record of random keep=8: python run.py"):
        pages.check_complete(frame.iloc[:-1], ["mi", "random"])
