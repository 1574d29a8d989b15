"""The benchmarks' tables through the real loader, on five-row files in the hub's exact schema."""

import io
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image

from experiments import images
from experiments.benchmarks import table
from experiments.benchmarks.base import BenchmarkError, Sample, SampleError, digest, read_samples
from experiments.build import make_benchmark

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT / "tests/data/schemas"
FILES = {
    "gqa": SCHEMAS,
    "scienceqa": SCHEMAS / "scienceqa_img.parquet",
    "textvqa": SCHEMAS / "textvqa_validation.parquet",
    "mme": SCHEMAS / "mme_test.parquet",
    "pope": SCHEMAS / "pope_test.parquet",
}
SHORT = "Answer the question using a single word or phrase."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing of a test lands in the caches of whoever runs it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def benchmark(name, path=None, **options):
    config = OmegaConf.create({"dataset": OmegaConf.load(ROOT / f"conf/dataset/{name}.yaml")})
    config.dataset.path = str(path or FILES[name])
    config.dataset.benchmark.update(options)
    return make_benchmark(**OmegaConf.to_container(config.dataset.benchmark, resolve=True))


def rewrite(name, target, change):
    """A copy of a schema file in which ``change`` has edited the rows."""
    source = pq.read_table(FILES[name])
    rows = source.to_pylist()
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(change(rows) or rows, schema=source.schema), target)
    return target


@pytest.mark.parametrize("name", FILES)
def test_samples_keep_the_contract(name):
    bench = benchmark(name)
    samples = bench.samples()
    assert len({sample.id for sample in samples}) == len(samples) == (4 if name == "mme" else 5)
    assert bench.samples() == samples
    image_ids = [sample.image_id for sample in samples]
    changes = sum(a != b for a, b in pairwise(image_ids))
    assert changes == len(set(image_ids)) - 1
    for sample in samples:
        assert sample.question in sample.text
        (image,) = bench.images(sample.image_id)
        assert image.mode == "RGB" and image.size == (32, 32)
    json.dumps([[sample.answer, sample.meta] for sample in samples])


def test_gqa():
    samples = benchmark("gqa").samples()
    assert [sample.id for sample in samples] == ["20000000", "20000003", "20000001", "20000004", "20000002"]
    assert samples[0].text == f"Is the square red?\n{SHORT}"
    assert [sample.task for sample in samples] == ["binary", "open", "open", "binary", "binary"]
    bench = benchmark("gqa", scoring="lmms_eval")
    predictions = ["Yes.", "the blue", "chair!", "yes", "outdoors"]
    assert bench.score(samples, predictions) == [1, 0, 1, 0, 1]
    assert benchmark("gqa").score(samples, predictions) == [1, 0, 0, 0, 1]
    metrics = bench.metrics(samples, predictions, bench.score(samples, predictions))
    assert metrics == pytest.approx({"accuracy": 60, "binary": 200 / 3, "open": 50})


def test_scienceqa():
    bench = benchmark("scienceqa")
    with_context, without = bench.samples()[:2]
    option_letter = "Answer with the option's letter from the given choices directly."
    assert with_context.text == (
        f"Context: Figure: a made-up square.\nWhich one is number 0?\nA. solid\nB. liquid\n{option_letter}"
    )
    assert without.text == f"Which one is number 1?\nA. solid\nB. liquid\nC. gas\n{option_letter}"
    assert [f"{sample.question}\n{option_letter}" for sample in bench.samples()] == [s.text for s in bench.samples()]
    assert [sample.answer for sample in bench.samples()] == ["A", "B", "A", "B", "A"]
    assert bench.correct(with_context, "C") == 0


def test_scienceqa_finds_equal_images_by_content(tmp_path):
    def change(rows):
        rows[4]["image"] = rows[0]["image"]

    samples = benchmark("scienceqa", rewrite("scienceqa", tmp_path / "x.parquet", change)).samples()
    assert [sample.id for sample in samples] == ["0", "4", "1", "2", "3"]


def test_textvqa():
    samples = benchmark("textvqa").samples()
    assert samples[0].text == f"What is the brand?\nReference OCR token: ACME, 12\n{SHORT}"
    assert samples[0].content == "What is the brand?\nReference OCR token: ACME, 12", "CDPruner and MMTok keep the line"
    assert samples[0].question == "What is the brand?"
    assert samples[2].text == f"Who made this?\nReference OCR token: \n{SHORT}"
    assert benchmark("textvqa", ocr=False).samples()[0].text == f"What is the brand?\n{SHORT}"
    assert benchmark("textvqa").score(samples, ["Acme.", "x", "bob", "ten past ten", "8oz"]) == [1, 0, 1, 1, 0.9]


def test_textvqa_without_answers(tmp_path):
    def change(rows):
        rows[1]["answers"] = []

    with pytest.raises(
        BenchmarkError, match=r"row 2 of .*x.parquet: answers is \[\]: list should have at least 10 items"
    ):
        benchmark("textvqa", rewrite("textvqa", tmp_path / "x.parquet", change)).samples()


def test_mme():
    samples = benchmark("mme").samples()
    assert [sample.id for sample in samples[:2]] == ["existence/0001.png#0", "existence/0001.png#1"]
    assert samples[0].text == f"Is there a square in this image?\n{SHORT}"
    plain = benchmark("mme", prompt="plain").samples()[0]
    assert plain.text == "Is there a square in this image? Please answer yes or no."
    assert plain.question == samples[0].question == "Is there a square in this image?"


def test_mme_cognition_and_pairs(tmp_path):
    def change(rows):
        rows.append({**rows[4], "question": "Is it  C?  Please answer yes or no.", "answer": "No"})

    samples = benchmark("mme", rewrite("mme", tmp_path / "x.parquet", change), cognition=True).samples()
    assert [sample.task for sample in samples[4:]] == ["code_reasoning"] * 2
    assert samples[5].text == f"Is it  C?\n{SHORT}"
    with pytest.raises(BenchmarkError, match=r"two questions an image; code_reasoning/0003.png has 1"):
        benchmark("mme", cognition=True).samples()


def test_of_a_pair_with_a_bad_row_both_are_skipped(tmp_path):
    def change(rows):
        rows[1]["answer"] = None

    bench = benchmark("mme", rewrite("mme", tmp_path / "x.parquet", change), on_bad_row="skip")
    assert [sample.meta["pair"] for sample in bench.samples()] == ["OCR/0002.jpg"] * 2
    bad, odd = bench.skipped
    assert bad.startswith("row 2 of ") and "answer is null" in bad
    assert odd.startswith("row 1 of ") and odd.endswith("MME has two questions an image; existence/0001.png has 1")


def test_pope():
    samples = benchmark("pope").samples()
    assert samples[0].id == "adversarial/1"
    assert samples[0].text == f"Is there a square in the image?\n{SHORT}"
    assert benchmark("pope", prompt="plain").samples()[0].text == "Is there a square in the image?"
    bench = benchmark("pope")
    predictions = ["yes", "", "Yes", "No", None]
    scores = bench.score(samples, predictions)
    assert scores == [1, 0, 1, 1, 0]
    metrics = bench.metrics(samples, predictions, scores)
    assert (metrics["adversarial_accuracy"], metrics["popular_accuracy"], metrics["random_accuracy"]) == (50, 100, 50)
    assert metrics["accuracy"] == pytest.approx(200 / 3)
    assert set(bench.standard_errors(samples, scores)) == {"adversarial_accuracy", "random_accuracy"}
    two_each = samples[:2] + samples[3:]
    errors = bench.standard_errors(two_each, [1, 0, 0, 1])
    assert errors == pytest.approx({"accuracy": 50 / 2**0.5, "random_accuracy": 50, "adversarial_accuracy": 50})


def test_pope_questions_that_all_categories_share_count_once():
    """Against the spread of many draws: 200 questions are asked in all three categories, 200 in each alone."""
    rng = np.random.default_rng(0)
    of = [(c, str(k) if k < 200 else f"{c}{k}") for c in ("random", "popular", "adversarial") for k in range(400)]
    samples = [Sample(id=f"{c}/{q}", text=q, question=q, answer="yes", image_id="0", task=c) for c, q in of]
    bench = benchmark("pope")
    means, errors = [], []
    for _ in range(400):
        right = {question: float(rng.random() < 0.8) for _, question in of}
        scores = [right[question] for _, question in of]
        means.append(100 * np.mean(scores))
        errors.append(bench.standard_errors(samples, scores)["accuracy"])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_pope_keys_on_category_and_number(tmp_path):
    """question_id starts anew in each category."""

    def change(rows):
        for row in rows:
            row["question_id"] = "1"
        return [rows[0], rows[2], rows[3]]

    samples = benchmark("pope", rewrite("pope", tmp_path / "x.parquet", change)).samples()
    assert [sample.id for sample in samples] == ["adversarial/1", "popular/1", "random/1"]


@pytest.mark.parametrize("options", [{"prompt": "chatty"}, {"scoring": "vlmeval"}])
def test_unknown_option(options):
    with pytest.raises(Exception, match=r"is not one of (short_answer, plain|llava, lmms_eval)"):
        benchmark("pope", **options)


def same_image(rows):
    for row in rows:
        row["image"] = next(other["image"] for other in rows if other["image_source"] == row["image_source"])


def test_each_image_is_decoded_once(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(images.Image, "open", lambda file, real=Image.open: opened.append(file) or real(file))
    bench = benchmark("pope", rewrite("pope", tmp_path / "x.parquet", same_image))
    samples = bench.samples()
    assert not opened
    for sample in samples:
        bench.images(sample.image_id)
    assert len(opened) == len({sample.image_id for sample in samples}) == 3


def test_images_kept_in_memory_are_bounded():
    bench = benchmark("scienceqa")
    stored = table.StoredImages(bench.table, {f"{i}": i for i in range(5)}, cache_size=2)
    for i in range(5):
        stored.load(f"{i}")
    assert stored.load.cache_info().currsize == 2


def test_a_broken_image_is_an_error_of_its_sample_alone(tmp_path):
    def change(rows):
        whole = rows[0]["image"]["bytes"]
        rows[0]["image"] = {"bytes": b"not an image", "path": None}
        rows[2]["image"] = {"bytes": whole[: len(whole) // 2], "path": None}
        rows[4]["image"] = None

    bench = benchmark("pope", rewrite("pope", tmp_path / "x.parquet", change))
    first, _, second, _, third = bench.samples()
    for sample, reason in ((first, "cannot be decoded"), (second, "cannot be decoded"), (third, "is empty")):
        with pytest.raises(SampleError, match=f"{sample.image_id} {reason}"):
            bench.images(sample.image_id)
    with pytest.raises(SampleError, match="no image COCO_9 in the table"):
        bench.images("COCO_9")


def png(colour):
    content = io.BytesIO()
    Image.new("RGB", (5, 7), colour).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("source", ["COCO_1", None])
def test_rows_of_one_image_name_keep_their_own_images(tmp_path, source):
    def change(rows):
        for k, row in enumerate(rows):
            row["image_source"] = source
            row["image"] = {"bytes": png((40 * k, 0, 0)), "path": None}

    bench = benchmark("pope", rewrite("pope", tmp_path / "x.parquet", change))
    assert [bench.images(sample.image_id)[0].getpixel((0, 0))[0] for sample in bench.samples()] == [0, 40, 80, 120, 160]


def test_images_may_lie_beside_the_table(tmp_path):
    def change(rows):
        for row in rows:
            row["image"] = {"bytes": None, "path": "scene.png"}

    path = rewrite("pope", tmp_path / "x.parquet", change)
    bench = benchmark("pope", path)
    with pytest.raises(SampleError, match=r"is not there: scene.png beside the table"):
        bench.images(bench.samples()[0].image_id)
    missing = digest(bench, bench.samples())
    (tmp_path / "scene.png").write_bytes(png("red"))
    bench = benchmark("pope", path)
    assert bench.images(bench.samples()[0].image_id)[0].getpixel((0, 0)) == (255, 0, 0)
    assert digest(bench, bench.samples()) != missing


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("pope", {"answer": None}, r"row 2 of .*x.parquet: answer is null: input should be 'yes' or 'no'"),
        ("pope", {"category": "hard"}, r"row 2 of .*: category is 'hard': input should be 'random', 'popular' or"),
        ("pope", {"question": None}, r"row 2 of .*: question is null"),
        ("scienceqa", {"choices": list("abcdef")}, r"row 2 of .*: choices is .*: list should have at most 5 items"),
        ("scienceqa", {"answer": -1}, r"row 2 of .*: answer is -1: input should be greater than or equal to 0"),
        ("scienceqa", {"answer": 4}, r"answer 4 is none of the 3 choices, counted from 0"),
        ("mmvet", {"answer": None}, r"row 2 of .*: answer is null"),
    ],
)
def test_a_bad_row_is_named_when_it_is_read(tmp_path, name, row, message):
    source = pq.read_table(SCHEMAS / f"{'scienceqa_img' if name == 'scienceqa' else f'{name}_test'}.parquet")
    rows = source.to_pylist()
    rows[1] |= row
    pq.write_table(pa.Table.from_pylist(rows, schema=source.schema), tmp_path / "x.parquet")
    options = {"judge": None} if name == "mmvet" else {}
    with pytest.raises(BenchmarkError, match=message):
        benchmark(name, tmp_path / "x.parquet", **options).samples()
    bench = benchmark(name, tmp_path / "x.parquet", on_bad_row="skip", **options)
    assert len(bench.samples()) == 4 and len(bench.skipped) == 1


def test_questions_of_one_id_are_numbered(tmp_path):
    def change(rows):
        return [rows[0], rows[0] | {"question": "Is there a cup ?"}]

    samples = read_samples(benchmark("pope", rewrite("pope", tmp_path / "x.parquet", change)))
    assert [sample.id for sample in samples] == ["adversarial/1", "adversarial/1#2"]


def test_grey_and_palette_images_become_rgb(tmp_path):
    def change(rows):
        for row, mode in zip(rows, ("L", "P", "RGBA", "1", "CMYK"), strict=True):
            content = io.BytesIO()
            Image.new(mode, (5, 7)).save(content, "TIFF" if mode == "CMYK" else "PNG")
            row["image"] = {"bytes": content.getvalue(), "path": None}

    bench = benchmark("scienceqa", rewrite("scienceqa", tmp_path / "x.parquet", change))
    assert {bench.images(sample.image_id)[0].mode for sample in bench.samples()} == {"RGB"}


# ------------------------------------------------------------------------------------------------------- local layouts


def test_a_folder_laid_out_like_the_repository(tmp_path):
    for name in ("data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet", "Full/random-00000.parquet"):
        rewrite("pope", tmp_path / name, lambda rows: rows[:2])
    assert len(benchmark("pope", tmp_path).samples()) == 4
    assert len(benchmark("pope", tmp_path / "data/*.parquet").samples()) == 4
    (tmp_path / "data/test-00001-of-00002.parquet").unlink()
    with pytest.raises(BenchmarkError, match="1 of the 2 parquet files of split test"):
        benchmark("pope", tmp_path).samples()


@pytest.mark.parametrize("name", ["default/test/0000.parquet", "test-00000-of-00001.parquet"])
def test_hidden_companions_are_no_data(tmp_path, name):
    rewrite("pope", tmp_path / name, lambda rows: rows[:2])
    (tmp_path / name).with_name(f"._{Path(name).name}").write_bytes(b"\x00\x05\x16\x07")
    assert len(benchmark("pope", tmp_path).samples()) == 2


def test_a_name_with_brackets(tmp_path):
    path = rewrite("pope", tmp_path / "my [1]/pope [v2]_test.parquet", lambda rows: rows[:2])
    assert len(benchmark("pope", path).samples()) == len(benchmark("pope", path.parent).samples()) == 2


def test_config_and_split_pick_the_files(tmp_path):
    for name in ("ScienceQA-FULL/test-00000-of-00001", "ScienceQA-IMG/validation-00000-of-00001"):
        rewrite("scienceqa", tmp_path / f"{name}.parquet", lambda rows: rows[:1])
    with pytest.raises(BenchmarkError, match="no parquet file of config ScienceQA-IMG, split test; it has ScienceQA-F"):
        benchmark("scienceqa", tmp_path).samples()
    rewrite("scienceqa", tmp_path / "ScienceQA-IMG/test-00000-of-00001.parquet", lambda rows: rows[:3])
    assert len(benchmark("scienceqa", tmp_path).samples()) == 3


def test_errors_of_files_are_one_line(tmp_path):
    with pytest.raises(BenchmarkError, match=r"nowhere.parquet does not exist; give a parquet file"):
        benchmark("pope", tmp_path / "nowhere.parquet").samples()
    with pytest.raises(BenchmarkError, match=r"lacks the column answer, image_source, question_id; it has .*question"):
        pq.write_table(pq.read_table(FILES["pope"]).select(["question", "image", "category"]), tmp_path / "a.parquet")
        benchmark("pope", tmp_path / "a.parquet").samples()
    with pytest.raises(BenchmarkError, match="lacks the column image;"):
        pq.write_table(pq.read_table(FILES["pope"]).drop(["image"]), tmp_path / "b.parquet")
        benchmark("pope", tmp_path / "b.parquet").samples()
    with pytest.raises(BenchmarkError, match=r"the column image of .* holds no images"):
        numbers = pq.read_table(FILES["pope"]).drop(["image"]).append_column("image", pa.array(range(5)))
        pq.write_table(numbers, tmp_path / "c.parquet")
        benchmark("pope", tmp_path / "c.parquet").samples()
    with pytest.raises(BenchmarkError, match=r"d.parquet cannot be read: ") as error:
        (tmp_path / "d.parquet").write_bytes(b"PAR1 this is no parquet file")
        benchmark("pope", tmp_path / "d.parquet").samples()
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------- hub


class Hub(BaseHTTPRequestHandler):
    """The four kinds of request with which a data set is fetched from the hub."""

    repositories: dict[str, dict[str, bytes]]
    fetched: list[str]
    sha = "0" * 40

    def reply(self, content: bytes, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "X-Repo-Commit": self.sha, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.split("?")[0]
        match = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(resolve|tree|revision)/[^/]+/?(.*))?", path)
        files = match and self.repositories.get(match[1])
        if files is None:
            return self.reply(b"{}", 404, X_Error_Code="RepoNotFound")
        if match[2] == "resolve":
            if self.command == "GET":
                self.fetched.append(match[3])
            return self.reply(files[match[3]], ETag=f'"{hash(files[match[3]])}"')
        if match[2] == "tree":
            listing = [{"type": "file", "path": n, "size": len(c), "oid": f"{hash(c)}"} for n, c in files.items()]
            return self.reply(json.dumps(listing).encode())
        info = {"id": match[1], "sha": self.sha, "siblings": [{"rfilename": name} for name in files]}
        return self.reply(json.dumps(info).encode())

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@contextmanager
def hub(monkeypatch, repositories):
    handler = type("Handler", (Hub,), {"repositories": repositories, "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    constants, endpoint = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def from_hub(name):
    config = OmegaConf.create({"dataset": OmegaConf.load(ROOT / f"conf/dataset/{name}.yaml")})
    return make_benchmark(**OmegaConf.to_container(config.dataset.benchmark, resolve=True))


def test_hub_fetches_the_split_alone_and_serves_it_without_a_network(monkeypatch):
    content = FILES["textvqa"].read_bytes()
    files = {f"data/{name}-00000-of-00001.parquet": content for name in ("train", "validation", "test")}
    with hub(monkeypatch, {"lmms-lab/textvqa": files}) as server:
        samples = from_hub("textvqa").samples()
        assert len(samples) == 5
        assert server.fetched == ["data/validation-00000-of-00001.parquet"]
    start = time.monotonic()
    assert from_hub("textvqa").samples() == samples
    assert time.monotonic() - start < 4


def test_hub_tries_the_renamed_organisation(monkeypatch):
    files = {f"data/{name}.parquet": (SCHEMAS / f"{name}.parquet").read_bytes() for name in ("mme_test", "pope_test")}
    with hub(monkeypatch, {"lmms-lab-encoder/MME": {"data/test-00000.parquet": files["data/mme_test.parquet"]}}):
        assert len(from_hub("mme").samples()) == 4
        with pytest.raises(BenchmarkError, match=r"lmms-lab/POPE is not there.*lmms-lab-encoder/POPE is not there"):
            from_hub("pope").samples()


def test_hub_without_the_split(monkeypatch):
    files = {"data/train-00000.parquet": b"", "README.md": b""}
    with (
        hub(monkeypatch, {"lmms-lab/POPE": files}),
        pytest.raises(BenchmarkError, match="lmms-lab/POPE has no parquet file of split test; it has data/train-00000"),
    ):
        from_hub("pope").samples()


def test_no_network_is_one_line_within_seconds(monkeypatch):
    with hub(monkeypatch, {}):
        pass  # now nobody listens there
    start = time.monotonic()
    with pytest.raises(BenchmarkError, match=r"the hub cannot be reached .*set dataset.path") as error:
        from_hub("pope").samples()
    assert time.monotonic() - start < 4
    assert "\n" not in str(error.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BenchmarkError, match=r"the hub cannot be reached .*offline mode.*set dataset.path"):
        from_hub("pope").samples()


def test_a_network_that_never_answers(monkeypatch):
    monkeypatch.setattr(table, "HUB_TIMEOUT_S", 0.3)
    with hub(monkeypatch, {}) as server:
        server.do_GET = lambda self: time.sleep(1)
        start = time.monotonic()
        with pytest.raises(BenchmarkError, match="the hub cannot be reached"):
            from_hub("pope").samples()
        assert time.monotonic() - start < 1
