"""Each family inside vLLM on a tiny random checkpoint, token for token as `Pipeline` or `mipruner.prune` in
transformers: `make test-vllm`."""

import base64
from copy import deepcopy
from dataclasses import replace

import numpy as np
import openai
import pytest
import torch
from PIL import Image

pytest.importorskip("mipruner_vllm", reason="vLLM lives in an environment of its own: make test-vllm")

import cv2

import mipruner
import tiny
import vllm_checkpoints
from experiments.served import serve
from families import qwen_vl
from mipruner.decoding import Decoding
from mipruner.models import FAMILIES, Prompt
from mipruner.pipeline import Pipeline
from mipruner.pruners import PRUNERS
from test_vllm import SamplingParams, ask, engine, message, rendered, tokens

SIZES = {"llava_next": (56, 112), "llava_onevision": (56, 112), "internvl": (56, 56)}
"""Width and height of images that no processor resizes: torchvision's resizing, which vLLM uses, differs from PIL's."""


def asked_of(family):
    width, height = SIZES.get(family, (84, 56))
    first, second = tiny.make_image(0, width, height), tiny.make_image(1, height, width)
    asked = [("What is it ?", first), ("Which colour ?", first), ("How many ?", second), ("Why ?", second)]
    if family != "llava_onevision":  # several images are no tiles there
        asked.append(("Which is larger ?", first, second))
    return asked


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "llava_next", "llava_onevision", "internvl", "qwen3_vl_moe"]
)
def test_a_family_answers_as_in_pipeline_in_one_piece_and_in_many(family, tmp_path):
    compare(family, tmp_path, pipeline_of(family, tmp_path))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_two_ranks_answer_as_in_pipeline(family, tmp_path):
    """Tensor parallelism: each rank has half of the word embeddings."""
    compare(family, tmp_path, pipeline_of(family, tmp_path), tensor_parallel_size=2)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_video_is_pruned_as_in_pipeline(family, tmp_path):
    """The budget is that of all frames; positions in time are those of the kept tokens' frames.

    Clips no longer than they are wide: transformers counts on after the largest of height and width, vLLM, and so the
    plug-in, after the largest of time, height and width.
    """
    expected, answers = pipeline_of(family, tmp_path, **qwen_vl.OPTIONS), set()
    clips, long = [tiny.video(1, 6, 140, 56), tiny.video(2, 4, 56, 84)], [("What is it ?", tiny.video(3, 10, fps=1.0))]
    asked = [("What is it ?", clips[0]), ("Which colour ?", clips[0]), ("How many ?", clips[1]), ("Why ?", *clips)]
    with engine(str(tmp_path), None) as llm:
        stock = watch(llm, long)
    with engine(str(tmp_path), max_num_batched_tokens=48, block_size=32, limit_mm_per_prompt={"video": 2}) as llm:
        for keep in (1.0, 0.5, 0.25, 0.5):
            right = [expected(keep, *one) for one in asked]
            assert watch(llm, asked, keep=keep) == right, keep
            answers |= {tuple(one) for one in right}
        assert watch(llm, long, keep=1.0) == stock != watch(llm, long, keep=0.5)
        with pytest.raises(ValueError, match="images or videos in a prompt, not both"):
            watch(llm, long, image=tiny.make_image(0, 84, 56))
    assert len(answers) > 6


def test_a_video_through_the_server_is_pruned_as_in_pipeline(tmp_path):
    """As the data: URL of a file; a bad budget is HTTP 400."""
    expected, clip = pipeline_of("qwen2_vl", tmp_path, **qwen_vl.OPTIONS), tiny.video(1, 6, 140, 56)
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), clip.fps, clip.frames[0].size)
    for frame in clip.frames:
        writer.write(np.asarray(frame)[..., ::-1])
    writer.release()
    coded, file = [], cv2.VideoCapture(str(path))
    while (read := file.read())[0]:
        coded.append(Image.fromarray(read[1][..., ::-1]))
    assert len(coded) == len(clip.frames)
    clip, url = replace(clip, frames=coded), f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What is it ?"}]
    options = ("--max-model-len", "1024", "--dtype", "float32", "--enforce-eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
        with serve(str(tmp_path), {"pruner": "mi", "options": {"lam": 0.5}}, tmp_path / "log", *options) as server:
            for keep in (1.0, 0.5, 0.25):
                reply = server.client.chat.completions.create(
                    model="served",
                    messages=[{"role": "user", "content": content}],
                    max_tokens=8,
                    temperature=0,
                    extra_body={"mm_processor_kwargs": {"keep": keep}, "return_token_ids": True},
                )
                found = [token for token in reply.choices[0].token_ids if token != 2]
                assert found == expected(keep, "What is it ?", clip), keep
            with pytest.raises(openai.BadRequestError, match=r"keep=0 .* in \(0, 1\] or a whole"):
                server.client.chat.completions.create(
                    model="served",
                    messages=[{"role": "user", "content": content}],
                    extra_body={"mm_processor_kwargs": {"keep": 0}},
                )


def watch(llm, asked, image=None, **kwargs):
    """Answers about videos, and perhaps an image."""
    prompts = []
    for text, *clips in asked:
        kinds = [*["video"] * len(clips), *["image"] * (image is not None)]
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
        data = {"video": [frames_of(clip) for clip in clips]} | ({} if image is None else {"image": image})
        prompt = {"prompt": rendered(llm, [{"role": "user", "content": content}]), "multi_modal_data": data}
        prompts.append(prompt | {"mm_processor_kwargs": kwargs})
    return tokens(llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0), use_tqdm=False))


def frames_of(clip):
    """A video as vLLM takes it."""
    n = len(clip.frames)
    facts = {"fps": clip.fps, "total_num_frames": n, "frames_indices": list(range(n)), "do_sample_frames": False}
    return np.stack([np.asarray(frame) for frame in clip.frames]), facts | {"duration": n / clip.fps}


def pipeline_of(family, folder, **options):
    """Saves a checkpoint; returns what `Pipeline` answers with the same weights."""
    model, processor = vllm_checkpoints.save(family, folder)
    adapter = FAMILIES[family](model, processor.tokenizer, tiny.processor_of(family), **options)

    def expected(keep, text, *images):
        pipeline = Pipeline(adapter, PRUNERS["mi"](lam=0.5), keep, Decoding(max_new_tokens=8))
        return pipeline([Prompt(text, list(images))])[0].tokens

    return expected


@pytest.mark.parametrize("family", ["mistral3", "smolvlm", "gemma3"])
def test_a_family_answers_as_under_prune_in_one_piece_and_in_many(family, tmp_path):
    """Gemma 3: without the types of tokens, as vLLM's attention on a CPU, which is causal inside images."""
    model, processor = vllm_checkpoints.save(family, tmp_path)

    def expected(keep, text, *images):
        inputs = inputs_of(processor, text, *images)
        inputs.pop("token_type_ids", None)
        with mipruner.prune(model, "mi", keep, tokenizer=processor, positions="repack", lam=0.5):
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return [token for token in out[0, inputs["input_ids"].shape[1] :].tolist() if token != 2]

    compare(family, tmp_path, expected)


def inputs_of(processor, text, *images):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    written = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[images], text=written, add_special_tokens=False, return_tensors="pt")


def test_qwen3_5_is_as_far_from_float32_as_bfloat16_alone(tmp_path):
    """vLLM's linear attention needs bfloat16 on a CPU. Rounding alone changes what is kept and said: so distances."""
    model, processor = vllm_checkpoints.save("qwen3_5", tmp_path)
    asked = [(f"{text} {k}", *images) for k in range(3) for text, *images in asked_of("qwen3_5")]
    options = {"max_num_batched_tokens": 96, "block_size": 32, "dtype": "bfloat16", "max_logprobs": -1}

    @torch.inference_mode()
    def expected(model, keep):
        rows = []
        for one in asked:
            with mipruner.prune(model, "mi", keep, tokenizer=processor, lam=0.5):
                inputs = inputs_of(processor, *one)
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
                rows.append(model(**inputs).logits[0, -1].float().log_softmax(-1))
        return torch.stack(rows)

    def distance(rows, right):
        return (rows - right).abs().mean(1).median()

    rounded = deepcopy(model).bfloat16()
    with engine(str(tmp_path), **options) as llm:
        for keep in (1.0, 0.5, 0.25):
            outputs = ask(llm, [message(*one) for one in asked], keep, n=1, logprobs=-1)
            found = [out.outputs[0].logprobs[0] for out in outputs]
            found = torch.tensor([[one[k].logprob for k in range(len(one))] for one in found])
            right, other = expected(model, keep), expected(model, 1.0 if keep < 1 else 0.25)
            alone = distance(expected(rounded, keep), right)
            print(keep, distance(found, right), alone, distance(found, other))
            assert distance(found, right) < 1.5 * alone < distance(found, other)


def compare(family, folder, expected, **options):
    """Four budgets, several questions, images of two sizes, pieces that end inside an image, a warm prefix cache."""
    pieces, asked, answers = 192 if family == "llava_onevision" else 96, asked_of(family), set()
    with engine(str(folder), max_num_batched_tokens=pieces, block_size=32, **options) as llm:
        for keep in (1.0, 0.5, 0.25, 0.5):  # the last from a warm prefix cache
            right = [expected(keep, *one) for one in asked]
            assert tokens(ask(llm, [message(*one) for one in asked], keep, n=8)) == right, keep
            answers |= {tuple(one) for one in right}
    assert len(answers) > 6  # what was kept changes what is said
