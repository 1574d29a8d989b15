"""The built package: every module of mipruner is in it, and the three lines of README run from it alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = """
import sys
sys.path.insert(0, sys.argv[1])
import mipruner
assert mipruner.__file__.startswith(sys.argv[1]), mipruner.__file__
import torch
from mipruner.models import load
adapter = load(sys.argv[2], dtype="float32", device="cpu")
from PIL import Image
encoded = adapter.tokenizer("USER: <image>\\nWhat color is the sun ?", return_tensors="pt")
pixels = adapter.image_processor(Image.new("RGB", (336, 336), "red"), return_tensors="pt")
ids = encoded.input_ids[0].tolist()
place = ids.index(adapter.model.config.image_token_id)
ids = torch.tensor([ids[:place] + [ids[place]] * 576 + ids[place + 1:]])
with mipruner.prune(adapter.model, "mi", keep=0.25, text="What color is the sun ?", tokenizer=adapter.tokenizer):
    out = adapter.model.generate(input_ids=ids, pixel_values=pixels.pixel_values, max_new_tokens=2, do_sample=False)
assert out.shape[1] > ids.shape[1]
"""


def test_the_wheel_is_complete_and_works_alone(tmp_path):
    pytest.importorskip("setuptools", "77")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "mipruner", "pyproject.toml", "README.md", "LICENSE"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("mi_pruner-*.whl")
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if name.startswith("mipruner/")}
        file.extractall(tmp_path / "installed")
    assert inside == {name for name in names if name.startswith("mipruner/")}
    command = [sys.executable, "-c", LINES, str(tmp_path / "installed"), str(ROOT / "experiments/demo/llava")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
