"""Draws the largest possible speed-up by pruning over image tokens and question length, from FLOPs.

    python -m analysis.speedup                     # docs/results/speedup.png

FLOPs of vision encoder and prefill count, at the same speed. Decoding and selection do not count. If the image tokens
of the prefill have a share s of the FLOPs, the speed-up by pruning after the encoder is at most 1 / (1 - s).
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from analysis.command import arguments
from analysis.figures import GREEN, ORANGE, PAGE, RED, STYLE
from experiments.flops import Decoder, architecture, vision_flops
from experiments.tabular import Table

QUESTIONS = {20: (RED, "-"), 60: (ORANGE, "--"), 240: (GREEN, ":")}
"""Number of other tokens in the prompt, and line style."""

MODELS = {
    "llava15_7b": ("LLaVA-1.5-7B", (576,)),
    "qwen25vl_7b": ("Qwen2.5-VL-7B", (144, 256, 576, 1024, 2304, 4096)),
    "qwen3vl_8b": ("Qwen3-VL-8B", (144, 256, 576, 1024, 2304, 4096)),
    "qwen3vl_2b": ("Qwen3-VL-2B", (144, 256, 576, 1024, 2304, 4096)),
}
"""Models with a formula for vision FLOPs, and numbers of image tokens to draw."""

KEEP = 1 / 9


def speedup(model: str, n_visual: int, n_text: int, keep: float = KEEP) -> tuple[float, float]:
    """FLOPs of vision and prefill with all tokens divided by those with the share ``keep``, and the share of vision."""
    config = architecture(model)
    decoder, vision = Decoder.of(config.get_text_config()), vision_flops(config, n_visual)
    if vision is None:
        raise ValueError(f"there is no closed form of the vision encoder of {model}")
    full = vision + decoder.prefill_flops(n_visual + n_text)
    return full / (vision + decoder.prefill_flops(round(keep * n_visual) + n_text)), vision / full


def draw() -> Figure:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(MODELS), figsize=(PAGE, 0.36 * PAGE), sharey=True, layout="constrained")
        for ax, (model, (title, sizes)) in zip(axes, MODELS.items(), strict=True):
            for n_text, (color, dash) in QUESTIONS.items():
                values = [speedup(model, n, n_text)[0] for n in sizes]
                ax.plot(sizes, values, dash, color=color, marker="o", markersize=3, label=f"{n_text} other tokens")
            ax.set(title=title, xscale="log", xlabel="image tokens")
            ax.set_xticks([144, 576, 2304], ["144", "576", "2,304"])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0].set(ylabel="FLOPs, all / one ninth kept", ylim=(1, None))
        axes[-1].legend()
    return figure


def table() -> str:
    """The numbers for 60 other tokens as Markdown."""
    lines = []
    for model, (title, sizes) in MODELS.items():
        for n in sizes:
            config = architecture(model)
            decoder, vision = Decoder.of(config.get_text_config()), vision_flops(config, n) or 0
            gain, share = speedup(model, n, 60)
            most = (vision + decoder.prefill_flops(n + 60)) / (vision + decoder.prefill_flops(60))
            lines.append([title, f"{n:,}", f"{share:.0%}", f"{most:.1f}", f"{gain:.1f}"])
    head = ["model", "image tokens", "vision's share", "most that pruning can gain", "a ninth kept"]
    return Table(head, lines).markdown()


def main() -> None:
    out = arguments(__doc__, out="docs/results/speedup.png").parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    draw().savefig(out, dpi=200)
    print(table())
    print(out)


if __name__ == "__main__":
    main()
