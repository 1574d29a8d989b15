"""The video sets on small videos made here: each frame of one grey, so that a frame says which it is."""

import json
import struct
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from clips import greys, write_set, write_video
from experiments import build
from experiments.benchmarks import video
from experiments.benchmarks.base import BenchmarkError, SampleError
from experiments.build import make_benchmark
from experiments.cell import run_cell
from mipruner.errors import InputError

ROOT = Path(__file__).parent.parent
VIDEOS = {"msvd": "videos", "msrvtt": "videos/all", "tgif": "mp4"}


def positions(images: list[Image.Image], n: int) -> list[int]:
    """Which of the n frames each image is."""
    return [int(np.abs(np.asarray(image).mean() - np.asarray(greys(n))).argmin()) for image in images]


def write_gif(path: Path, n: int) -> None:
    images = [Image.new("L", (64, 48), grey) for grey in greys(n)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)


def benchmark(name, path, judge=None, **options):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [f"dataset={name}"])
    config = OmegaConf.create({"dataset": config.dataset, "judge": judge or {}})
    config.dataset.path = str(path) if path else None
    config.dataset.benchmark.update(options)
    return make_benchmark(**OmegaConf.to_container(config.dataset.benchmark, resolve=True))


@pytest.mark.parametrize("name", VIDEOS)
def test_samples_are_paired_by_question_id(name, tmp_path):
    write_set(tmp_path)
    write_video(tmp_path / VIDEOS[name] / "v0.mp4", 10)
    bench = benchmark(name, tmp_path)
    samples = bench.samples()
    assert bench.is_video
    assert [(sample.id, sample.answer) for sample in samples] == [(f"v{i // 2}_{i}", f"answer{i}") for i in range(4)]
    assert samples[1].text == samples[1].question == "what is number 1?"
    assert [sample.image_id for sample in samples] == ["v0", "v0", "v1", "v1"]
    assert len(bench.images("v0")) == 8
    with pytest.raises(SampleError, match="no video v1 in "):
        bench.images("v1")


def test_a_model_that_cannot_be_shown_a_video_is_refused_before_anything_is_answered(tmp_path):
    write_set(tmp_path)
    words = [
        "model=demo_qwen3vl",
        "dataset=msvd",
        f"dataset.path={tmp_path}",
        f"results={tmp_path / 'results'}",
        "judge=offline",
    ]
    with initialize_config_dir(str(ROOT.resolve() / "conf"), version_base=None):
        settings = build.resolve(compose("config", [*words, "device=cpu"]))
    with pytest.raises(InputError, match="the chat template writes 0 placeholders for one video"):
        run_cell(settings)
    assert not (tmp_path / "results").exists()


def test_first_thousand_of_the_file(tmp_path):
    write_set(tmp_path, 1203)
    assert [sample.id for sample in benchmark("msvd", tmp_path).samples()] == [f"v{i // 2}_{i}" for i in range(1000)]
    assert len(benchmark("msvd", tmp_path, first=None).samples()) == 1203


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "mpeg4"), (".avi", "mpeg4"), (".mov", "mpeg4"), (".mkv", "ffv1")]
)
@pytest.mark.parametrize("n", [30, 8, 3, 1])
def test_frames_are_evenly_spaced(tmp_path, suffix, codec, n):
    write_set(tmp_path)
    write_video(tmp_path / f"videos/v0{suffix}", n, codec)
    images = benchmark("msvd", tmp_path).images("v0")
    assert [image.mode for image in images] == ["RGB"] * 8
    assert [image.size for image in images] == [(64, 48)] * 8
    assert positions(images, n) == [int(i * (n - 1) / 7) for i in range(8)]


def test_gif_and_a_name_with_its_suffix(tmp_path):
    rows = [{"video_name": "cat.gif", "question": "what?", "answer": "cat"}]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "mp4").mkdir()
    write_gif(tmp_path / "mp4/cat.gif", 15)
    bench = benchmark("tgif", tmp_path, questions="qa.jsonl", answers=None, n_frames=4)
    (sample,) = bench.samples()
    assert (sample.id, sample.answer) == ("0", "cat")
    assert positions(bench.images(sample.image_id), 15) == [0, 4, 9, 14]


@pytest.mark.parametrize(("name", "codec"), [("v0.MP4", "mpeg4"), ("v0.webm", "libvpx-vp9"), ("v0.Mkv", "ffv1")])
def test_suffixes_in_any_case(tmp_path, name, codec):
    write_set(tmp_path)
    write_video(tmp_path / "videos/x.mkv" if name == "v0.Mkv" else tmp_path / "videos" / name, 8, codec)
    if name == "v0.Mkv":
        (tmp_path / "videos/x.mkv").rename(tmp_path / "videos/v0.Mkv")
    assert len(benchmark("msvd", tmp_path).images("v0")) == 8


def test_a_damaged_packet_loses_itself_and_not_the_video(tmp_path):
    path = tmp_path / "x.mkv"
    write_video(path, 20, "vp9")
    with av.open(str(path)) as container:
        last = bytes([packet for packet in container.demux(video=0) if packet.size][-1])
    content = path.read_bytes()
    assert content.count(last) == 1
    path.write_bytes(content.replace(last, b"\xff" * len(last)))
    with av.open(str(path)) as container, pytest.raises(av.error.InvalidDataError):
        list(container.decode(video=0))
    assert len(video.frames(path, 8)) == 8


@pytest.mark.parametrize("text", ["\ufeff{}", '{{"questions": {}}}', "{}"])
def test_tables_with_a_mark_or_in_an_object(tmp_path, text):
    rows = [{"video_name": "a", "question": "what\u2028is it?", "answer": "x", "question_id": 1}]
    written = json.dumps(rows, ensure_ascii=False)
    (tmp_path / "q.json").write_text(text.format(written), encoding="utf-8")
    (tmp_path / "q.jsonl").write_text(written[1:-1], encoding="utf-8")
    for name in ("q.json", "q.jsonl"):
        (sample,) = benchmark("msvd", tmp_path, questions=name, answers=None).samples()
        assert (sample.id, sample.question) == ("1", "what\u2028is it?")


def test_no_frame_is_flipped(tmp_path):
    path = tmp_path / "half.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        image = np.zeros((48, 64, 3), np.uint8)
        image[:, 32:] = 255
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    for frame in video.frames(path, 8):
        assert np.asarray(frame)[:, :24].mean() < 10 < 200 < np.asarray(frame)[:, 40:].mean()


@pytest.mark.parametrize(("quarter", "white"), [((0, 1, -1, 0), "below"), ((0, -1, 1, 0), "above")])
def test_a_phones_video_stands_upright(tmp_path, quarter, white):
    """The rotation is a matrix in the file's track header: a turn to the right, as phones write it, and to the left."""
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        image = np.zeros((48, 64, 3), np.uint8)
        image[:, 32:] = 255
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    place, (a, b, c, d) = content.index(b"tkhd") + 44, (65536 * x for x in quarter)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    for frame in video.frames(path, 2):
        assert frame.size == (48, 64)
        top, bottom = (np.asarray(frame)[rows].mean() for rows in (slice(24), slice(40, None)))
        assert (bottom - top if white == "below" else top - bottom) > 200


def test_hub_copies_keep_questions_and_answers_in_one_table(tmp_path):
    rows = {"video_name": ["a", "b"], "question_id": ["7", "8"], "question": ["q?", "r?"], "answer": ["x", "y"]}
    pq.write_table(pa.table(rows | {"type": ["0", "1"]}), tmp_path / "test.parquet")
    samples = benchmark("msrvtt", tmp_path, questions="test.parquet", answers=None).samples()
    assert [(sample.id, sample.image_id, sample.answer) for sample in samples] == [("7", "a", "x"), ("8", "b", "y")]


def test_a_broken_video_is_an_error_of_its_samples_alone(tmp_path):
    write_set(tmp_path)
    write_video(tmp_path / "videos/v0.mp4", 30)
    whole = (tmp_path / "videos/v0.mp4").read_bytes()
    (tmp_path / "videos/v1.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "videos/v2.mp4").write_bytes(b"this is no video" * 100)
    (tmp_path / "videos/v3.mp4").write_bytes(b"")
    bench = benchmark("msvd", tmp_path)
    for name in ("v1", "v2", "v3"):
        with pytest.raises(SampleError, match=rf"the video {name}.mp4 cannot be decoded: "):
            bench.images(name)
    assert len(bench.images("v0")) == 8


def test_a_sound_file_has_no_frames(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(SampleError, match=r"the video sound.mkv has no frames"):
        video.frames(path, 8)


def test_errors_of_files_are_one_line(tmp_path):
    with pytest.raises(BenchmarkError, match=r"set dataset.path to their folder"):
        benchmark("msvd", None).samples()
    with pytest.raises(BenchmarkError, match=r"test_q.json cannot be read"):
        benchmark("msvd", tmp_path, answers=None).samples()
    write_set(tmp_path)
    (tmp_path / "test_a.json").write_text(json.dumps([{"answer": "x", "question_id": "v0_0"}]))
    with pytest.raises(BenchmarkError, match=r"test_a.json has no answer to question v0_1"):
        benchmark("msvd", tmp_path).samples()
    (tmp_path / "test_a.json").write_text("[{")
    with pytest.raises(BenchmarkError, match=r"test_a.json cannot be read"):
        benchmark("msvd", tmp_path).samples()
    (tmp_path / "q.json").write_text(json.dumps([{"clip": "a", "question": "q", "answer": "x"}]))
    with pytest.raises(BenchmarkError, match=r"row 1 of .*q.json: video_name is missing; it has clip, question"):
        benchmark("msvd", tmp_path, questions="q.json", answers=None).samples()
    twice = [{"video_name": "a", "question": "q", "question_id": 1, "answer": "x"}] * 2
    (tmp_path / "q.json").write_text(json.dumps(twice))
    with pytest.raises(BenchmarkError, match=r"row 2 of .*q.json: its id '1' is that of row 1"):
        benchmark("msvd", tmp_path, questions="q.json", answers=None).samples()


def test_bad_rows_of_questions_and_answers_are_skipped(tmp_path):
    write_set(tmp_path)
    questions, answers = (json.loads((tmp_path / f"test_{name}.json").read_text()) for name in "qa")
    answers.sort(key=lambda row: row["answer"])
    (tmp_path / "test_q.json").write_text(json.dumps([*questions, questions[0], questions[0] | {"question": None}]))
    (tmp_path / "test_a.json").write_text(json.dumps([*answers[1:3], answers[1] | {"answer": "other"}, answers[0]]))
    bench = benchmark("msvd", tmp_path, on_bad_row="skip")
    assert [(sample.id, sample.answer) for sample in bench.samples()] == [
        (f"v{i // 2}_{i}", f"answer{i}") for i in range(3)
    ]
    second, null, missing, repeated = (message.partition(": ")[2] for message in bench.skipped)
    assert (second, null) == (
        "it is a second answer to question v0_1",
        "question is null: input should be a valid string",
    )
    assert (missing, repeated) == ("test_a.json has no answer to question v1_3", "its id 'v0_0' is that of row 1")


READ = [
    ("{'pred': 'yes', 'score': 5}", (True, 5)),
    ("{'pred': 'No', 'score': 0}", (False, 0)),
    ('{"pred": "Yes.", "score": "4"}', (True, 4)),
    ("{'pred': 'yes', 'score': 4.8}", (True, 4)),
    ("{'pred': 'yes', 'score': '4.8'}", (None, 0)),
    ("{'pred': 'yes', 'score': None}", (None, 0)),
    ("{'pred': 'unknown', 'score': 1}", (False, 1)),
    ("{'pred': 'not sure', 'score': 1}", (False, 1)),
    ("{'pred': 'maybe', 'score': 2}", (None, 2)),
    ("{'pred': 'no, not yes', 'score': 2}", (True, 2)),
    ("```python\n{'pred': 'yes',\n 'score': 3}\n```", (True, 3)),
    ("{'pred': 'yes', 'score': 9}", None),
    ("{'pred': 'yes'}", None),
    ("{'score': 3}", None),
    ("{pred: yes, score: 3}", None),
    ("{'pred', 'score'}", None),
    ("yes, 5", None),
    ("{'pred': 'yes', 'score': 3", None),
    ("", None),
    ("{__import__('os')}", None),
]


@pytest.mark.parametrize(("reply", "grade"), READ)
def test_read_grade(reply, grade):
    if grade is None:
        with pytest.raises(ValueError):
            video.read_grade(reply)
    else:
        assert video.read_grade(reply) == grade


def test_metrics_of_the_judges_grades(tmp_path):
    """Accuracy is yes / (yes + no), score the sum over all; a failed video is a no."""

    class Judge:
        def grade(self, requests, read):
            replies = ["{'pred': 'yes', 'score': 5}", "{'pred': 'no', 'score': 2}", "{'pred': 'maybe', 'score': 3}"]
            self.asked = [request(0) for request in requests]
            return [read(reply) for reply in replies] + [None]

    write_set(tmp_path, 5)
    bench = benchmark("msvd", tmp_path)
    bench.judge, bench.prefix = Judge(), ""
    samples, predictions = bench.samples(), ["a", "b", "c", "{d}", None]
    scores = bench.score(samples, predictions)
    assert scores == [1, 0, 0, 0, 0]
    assert bench.metrics(samples, predictions, scores) == {"accuracy": 25, "score": 2}
    system, user = bench.judge.asked[3]["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"].startswith("Question: what is number 3?\nCorrect Answer: answer3\nPredicted Answer: {d}\n\n")
    assert user["content"].endswith("{'pred': 'yes', 'score': 4}")
    assert "temperature" not in bench.judge.asked[0]
    bench.temperature = 0
    bench.score(samples, predictions)
    assert bench.judge.asked[0]["temperature"] == 0


@pytest.mark.parametrize(
    ("answer", "prediction", "grade"),
    [
        ("cat", "The cat is sleeping.", (True, 5)),
        ("cat", "concatenate", (False, 0)),
        ("two", "2 dogs", (True, 5)),
        ("play guitar", "guitar", (False, 3)),
        ("cat", "", (False, 0)),
    ],
)
def test_offline_rule(answer, prediction, grade):
    assert video.offline_grade(answer, prediction) == grade


def test_offline_scores_have_names_of_their_own(tmp_path):
    write_set(tmp_path)
    bench = benchmark("tgif", tmp_path)
    samples = bench.samples()
    predictions = ["it is answer0", "nothing", None, "answer3"]
    scores = bench.score(samples, predictions)
    assert bench.metrics(samples, predictions, scores) == {"offline_accuracy": 50, "offline_score": 2.5}
    assert set(bench.standard_errors(samples, scores)) == {"offline_accuracy"}
    assert "not comparable" in bench.provenance()["judge"]
