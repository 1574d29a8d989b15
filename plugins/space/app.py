"""Explorer for Hugging Face Spaces: gradio provides form, upload and queue; `panels.js` draws.

The environment variable MODELS names models of conf/model, as in MODELS=qwen3vl_2b; by default both demo models.
"""

import base64
import os
import time
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from experiments.explorer import panels
from experiments.explorer.core import Explorer
from experiments.explorer.server import MAX_BYTES, MAX_QUESTION, Work, read_request
from mipruner.errors import InputError, ModelError

FIRST = ("mi", "similarity", "attention")
SCRIPT = """
const draw = () => { if (props.value) panels(element.querySelector('.panels'), props.value); };
watch('value', draw);
draw();
"""
OWN = (
    "Your own image replaces the scene. The demo models were trained on rendered scenes only: their answers about "
    "photographs mean nothing."
)


def ask(explorer: Explorer, progress: gr.Progress, asked: dict[str, Any]) -> dict[str, Any]:
    """Data for `panels.js`. An error of a request is one sentence on the page."""
    try:
        read = read_request(explorer, asked)
        work = Work(time.monotonic())

        def tell(done: int, n: int) -> None:
            work.tell(done, n)
            progress((done, n), unit="panels")

        return explorer.ask(read.model, read.image, read.key, read.questions, read.cells, scene=read.scene, tell=tell)
    except (InputError, ModelError) as error:
        raise gr.Error(str(error).replace("<", "&lt;"), print_exception=False) from error


def page(explorer: Explorer) -> gr.Blocks:
    """Page with the form on the left and the panels on the right."""
    offered = explorer.describe()
    scenes = [(f"scene {k}", k) for k in range(offered["n_scenes"])]
    titles = [(pruner["title"], name) for name, pruner in offered["pruners"].items()]

    def submit(model, scene, file, question, second, pruners, budgets, progress=gr.Progress()):  # noqa: B008
        source = {"scene": scene} if file is None else {"image": "," + base64.b64encode(file).decode()}
        questions = [question, second] if second.strip() else [question]
        budgets = budgets.replace(",", " ").split()
        asked = {"model": model, "pruners": {name: {} for name in pruners}, "questions": questions, "budgets": budgets}
        return ask(explorer, progress, asked | source)

    def known(scene):
        questions = [one["text"] for one in explorer.scene(scene)["questions"]]
        return gr.Dropdown(questions, value=questions[0])

    with gr.Blocks(title="MI-Pruner explorer", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("# MI-Pruner explorer\nWhich tokens of an image stay, and what the model then says.")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                scene = gr.Dropdown(scenes, value=0, label="Scene of the demo", elem_id="scene")
                file = gr.File(label="or your own image", type="binary", file_types=["image"], elem_id="file")
                gr.Markdown(OWN)
                question = gr.Dropdown(label="Question", allow_custom_value=True, elem_id="question")
                second = gr.Textbox(label="A second one beside it (optional)", max_length=MAX_QUESTION)
                model = gr.Dropdown(offered["models"], label="Model")
                budgets = gr.Textbox("64, 16", label="Tokens kept", elem_id="budgets")
                pruners = gr.CheckboxGroup(titles, value=[*FIRST], label="Methods")
                go = gr.Button("Ask", variant="primary", elem_id="go")
            with gr.Column(scale=3):
                shown = gr.HTML(
                    html_template="<div class='panels'></div>",
                    css_template=panels.style(),
                    js_on_load=panels.script() + SCRIPT,
                    apply_default_css=False,
                    elem_id="shown",
                )
        scene.change(known, scene, question)
        blocks.load(known, scene, question)
        go.click(
            submit,
            [model, scene, file, question, second, pruners, budgets],
            shown,
            concurrency_id="model",
            concurrency_limit=1,
            show_progress_on=go,
        )
    return blocks


def main() -> None:
    explorer = Explorer(models=os.environ.get("MODELS", "").split())
    explorer.adapter(explorer.models[0])
    page(explorer).queue(max_size=32).launch(
        share=False,
        max_file_size=MAX_BYTES,
        show_error=True,
        enable_monitoring=False,
        footer_links=[],
    )


if __name__ == "__main__":
    main()
