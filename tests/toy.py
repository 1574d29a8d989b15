"""A benchmark and a model of a few lines, for what is about the runner and not about accuracy."""

from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)

from experiments.benchmarks.base import Benchmark, Sample, SampleError
from experiments.results import ROOT

N_VISUAL = 36
N_LAYERS = 3


def save_toy_model(folder: Path) -> None:
    """A LLaVA with random weights that sees 36 tokens, with the demo's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "experiments/demo/llava")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=N_LAYERS, **sizes),
        vision_config=CLIPVisionConfig(image_size=84, patch_size=14, num_hidden_layers=3, projection_dim=32, **sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size=84).save_pretrained(folder)


def save_toy_video_model(folder: Path) -> None:
    """A Video-LLaVA with random weights: 4 x 4 patches a frame, the demo's words."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "experiments/demo/llava")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = VideoLlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **sizes),
        vision_config=CLIPVisionConfig(image_size=56, patch_size=14, **sizes),
        image_token_index=image,
        video_token_index=video,
    )
    VideoLlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    VideoLlavaImageProcessor(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)


class Toy(Benchmark):
    """``n`` images of one flat colour, two questions each; some of them broken on request."""

    def __init__(self, n: int = 6, corrupt: tuple[int, ...] = (), empty: tuple[int, ...] = ()):
        self.n, self.corrupt, self.empty = n, corrupt, empty
        self.asked: list[str] = []

    def samples(self):
        texts = ("What color is the sun ?", "Is there a king in the image ?")
        return [
            Sample(
                id=f"{k}-{j}",
                text=text if k not in self.empty else " ",
                question=text if k not in self.empty else " ",
                answer="yes",
                image_id=str(k),
                task=f"task{j}",
            )
            for k in range(self.n)
            for j, text in enumerate(texts)
        ]

    def images(self, image_id):
        self.asked.append(image_id)
        if int(image_id) in self.corrupt:
            raise SampleError(f"image {image_id} cannot be decoded")
        return [Image.new("RGB", (84, 84), (40 * int(image_id) % 256, 90, 160))]

    def correct(self, sample, prediction):
        return float(prediction == sample.answer)

    def metrics(self, samples, predictions, scores):
        return {"accuracy": 100 * sum(scores) / len(scores)}
