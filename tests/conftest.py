import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before anything imports triton


@pytest.fixture(scope="session")
def video_llava(tmp_path_factory):
    """The folder of a Video-LLaVA with random weights."""
    from toy import save_toy_video_model

    folder = tmp_path_factory.mktemp("video_llava")
    save_toy_video_model(folder)
    return folder
