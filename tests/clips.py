"""Small video sets in Video-LLaVA's layout; each frame is of one grey, so that a frame says which it is."""

import json
from pathlib import Path

import av
import numpy as np


def greys(n: int) -> list[int]:
    return np.linspace(20, 235, n).astype(int).tolist()


def write_video(path: Path, n: int, codec: str = "mpeg4") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for grey in greys(n):
            image = np.full((48, 64, 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def write_set(path: Path, n: int = 4) -> None:
    """Video-LLaVA's files; the answers stand in another order than the questions."""
    questions = [
        {"video_name": f"v{i // 2}", "question": f"what is number {i}?", "question_id": f"v{i // 2}_{i}"}
        for i in range(n)
    ]
    answers = [{"answer": f"answer{i}", "question_id": f"v{i // 2}_{i}"} for i in range(n)]
    path.mkdir(parents=True, exist_ok=True)
    (path / "test_q.json").write_text(json.dumps(questions))
    (path / "test_a.json").write_text(json.dumps(answers[::-1]))
