"""The built packages: complete, and README's lines run from the wheel alone; the extras name what the code imports."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from functools import cache
from pathlib import Path

import pytest

import mipruner

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta as b; _, out = sys.argv; b.build_sdist(out); b.build_wheel(out)"
MODEL = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
model.generation_config.max_new_tokens = 2
processor = AutoProcessor.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the sun ?"}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (336, 336), "red"), text=text, return_tensors="pt")
"""
COUNT = """
assert mipruner.__file__.startswith(sys.prefix), mipruner.__file__
with mipruner.prune(model, "mi", keep=0.25) as pruning:
    model.generate(**inputs)
print(mipruner.__version__, pruning)
"""
BROUGHT = {"numpy", "yaml", "safetensors", "huggingface_hub", "tokenizers", "triton", "omegaconf", "wandb"}
"""By torch, transformers and Hydra; wandb is imported by logger=wandb alone, which says so where it is missing."""
NAMES = {"PIL": "pillow", "hydra": "hydra-core"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist, and what git has of the package."""
    folder = tmp_path_factory.mktemp("built")
    names = subprocess.run(["git", "ls-files", "mipruner", "pyproject.toml", "README.md", "LICENSE"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    for name in names:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=folder / "source", check=True, capture_output=True)
    return folder, {name for name in names if name.startswith("mipruner/")}, set(names)


def test_wheel_and_sdist_are_complete(built):
    folder, modules, names = built
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    version = mipruner.__version__
    assert (wheel.name, sdist.name) == (f"mi_pruner-{version}-py3-none-any.whl", f"mi_pruner-{version}.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if ".dist-info/" not in name} == modules
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert names <= inside


def test_the_lines_of_readme_run_from_the_wheel(built, tmp_path):
    pip, (wheel,) = [sys.executable, "-m", "pip"], built[0].glob("*.whl")
    venv.create(tmp_path / "fresh", system_site_packages=True)
    python = tmp_path / "fresh/bin/python"
    (site,) = (tmp_path / "fresh/lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # of this environment, should it be one of its own
    install = ["--python", str(python), "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, *install, str(wheel)], check=True)
    (lines,) = re.findall(r"```python\n(import mipruner\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    done = subprocess.run(
        [str(python), "-c", MODEL + lines + COUNT, str(ROOT / "experiments/demo/llava")],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(f"{mipruner.__version__} mi, keep=0.25: kept 144 of 576"), done.stdout


def extra(name=None):
    """Packages of ``pip install mi-pruner[name]``, dependencies included."""
    required, found = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][name] if name else []), set()
    for line in required:
        package = re.match(r"[\w-]+", line)[0]
        found |= extra(re.search(r"\[(\w+)\]", line)[1]) if package == PROJECT["name"] else {package}
    return found


@cache
def imports(file):
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found.update(module.split(".")[0] for module in modules)
    return found


def third_party(*files):
    """Packages that these files import, at the top or inside a function."""
    names = set().union(*map(imports, files)) - {"mipruner", "experiments", "analysis", "run"}
    return {NAMES.get(name, name) for name in names - sys.stdlib_module_names - BROUGHT}


def test_extras_name_what_is_imported():
    explorer = [ROOT / "experiments/tasks/explorer.py", ROOT / "experiments/explorer/server.py"]
    rest = [file for part in ("experiments", "analysis") for file in (ROOT / part).rglob("*.py")]
    assert third_party(*(ROOT / "mipruner").rglob("*.py")) <= extra()
    assert third_party(ROOT / "run.py", *(file for file in rest if file not in explorer)) <= extra("run")
    assert third_party(*explorer) <= extra("explorer") and extra("run") <= extra("explorer")
    served = [ROOT / f"experiments/{name}.py" for name in ("remote", "served", "soak", "tasks/serving")]
    assert third_party(*served) | extra("run") | {"vllm"} <= extra("serve")
    unused = extra("explorer") - third_party(ROOT / "run.py", *rest, *(ROOT / "mipruner").rglob("*.py"))
    assert unused <= {"accelerate", "hydra-submitit-launcher", "pyarrow"}, "used by others alone"
