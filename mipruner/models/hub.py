"""Finds the folder of a model: the path itself, the hub's cache, or a download. Waiting times are limited."""

import json
from pathlib import Path
from threading import Thread

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mipruner.errors import ModelError

FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""Patterns of files that are downloaded: no pickles, no code."""
PATIENCE_S = 1.5
"""Time limit in seconds for asking the hub whether it has a model."""


def locate(path: str, revision: str | None = None) -> Path:
    """Folder of a model: ``path`` itself if it is a folder, else a snapshot of the hub id, downloaded if missing.

    Raises
    ------
    ModelError
        Within two seconds, if there is no such folder or model, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        if missing := lacking(Path(path)):
            raise ModelError(f"the folder {path} has no {missing}: copy the model into it again")
        return Path(path)
    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
        if lacking(folder) is None:
            return folder
    except HFValidationError:
        raise ModelError(
            f"no folder {path}, and the hub has no such ids: give a folder with config.json and safetensors, or an id "
            "of the form owner/name"
        ) from None
    except LocalEntryNotFoundError:
        pass
    ask(path, revision)
    return Path(snapshot_download(path, revision=revision, allow_patterns=FILES))


def lacking(folder: Path) -> str | None:
    """Name of a required file that is missing in the folder, or None."""
    index = folder / "model.safetensors.index.json"
    names = ["config.json", "tokenizer_config.json"]
    names += (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    return next((name for name in names if not (folder / name).exists()), None)


def chat_template(folder: Path) -> str | None:
    """Chat template of the processor, if there is one. The template of the tokenizer may not support images."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").exists():
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    return None


def ask(path: str, revision: str | None) -> None:
    """Ask the hub once, with a short timeout, whether it has this model."""
    errors: list[Exception] = [TimeoutError()]

    def look_up() -> None:
        try:
            HfApi().model_info(path, revision=revision, timeout=PATIENCE_S)
            errors.clear()
        except Exception as error:
            errors[0] = error

    thread = Thread(target=look_up, daemon=True)  # a name server can take longer than any timeout of the request
    thread.start()
    thread.join(PATIENCE_S)
    nowhere = f"cannot load {path}: no such folder, and not in {constants.HF_HUB_CACHE}"
    match errors:
        case []:
            return
        case [GatedRepoError()]:
            what = f"its licence must be accepted on {constants.ENDPOINT}/{path}, then run: hf auth login"
        case [RevisionNotFoundError()]:
            what = f"the hub has the model, but not the revision {revision}"
        case [RepositoryNotFoundError()]:
            what = "the hub has no such model, or it is private and needs: hf auth login"
        case _:
            command = f"hf download {path}" + (f" --revision {revision}" if revision else "")
            what = (
                f"{constants.ENDPOINT} cannot be reached from here. Where it can, run: {command}, and give the path of "
                "the folder"
            )
    raise ModelError(f"{nowhere}; {what}")
