"""Figs. 1 to 3: drawn the same way each time, and true to the code and to the module trees."""

import inspect

import pytest

from malmen_repro import training
from malmen_repro.replication.figures import save_figure
from malmen_repro.replication.paper_models import PAPER_MODELS, edited_layers
from malmen_repro.replication.procedures import (
    STEPS,
    BlockPart,
    arrow,
    box,
    canvas,
    draw_architectures,
    draw_concatenated,
    draw_split,
    label,
    last_block,
    place_of,
    stacks_of,
)


def texts(figure):
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


@pytest.mark.parametrize("draw", [draw_concatenated, draw_split, lambda: draw_architectures(["GPT-J"])])
def test_figures_are_the_same_bytes_each_time(draw, tmp_path):
    first, second = (save_figure(draw(), tmp_path / str(i)) for i in range(2))
    assert [path.suffix for path in first] == [".png", ".svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_all_text_stays_on_the_sheet():
    for figure in (draw_concatenated(), draw_split(), draw_architectures()):
        figure.canvas.draw()
        sheet = figure.bbox
        for text in figure.axes[0].texts:
            extent = text.get_window_extent()
            assert sheet.x0 <= extent.x0 and extent.x1 <= sheet.x1, text.get_text()
            assert sheet.y0 <= extent.y0 and extent.y1 <= sheet.y1, text.get_text()


def test_seven_steps_done_by_functions_that_exist():
    assert [step.number for step in STEPS] == ["i", "ii", "iii", "iv", "v", "vi", "vii"]
    source = inspect.getsource(training.meta_gradient)
    places = [source.index(f"{step.function}(") for step in STEPS]
    assert places == sorted(places) and all(callable(getattr(training, step.function)) for step in STEPS)
    assert {step.lane for step in STEPS} == {"language model", "hyper-network"}
    drawn = texts(draw_split())
    assert all(f"({step.number})" in drawn and step.function in drawn for step in STEPS)


@pytest.mark.parametrize(
    "layer, place",
    [
        ("transformer.h.11.mlp.c_proj", ("transformer.h", 11, "mlp.c_proj")),
        ("decoder.block.3.layer.2.DenseReluDense.wo", ("decoder.block", 3, "layer.2.DenseReluDense.wo")),
    ],
)
def test_place_of(layer, place):
    assert place_of(layer) == place


def test_stacks():
    assert stacks_of("GPT-J") == {"transformer.h": (28, set(range(22, 28)))}
    assert stacks_of("BERT-base") == {"bert.encoder.layer": (12, set(range(6, 12)))}
    both = (24, {21, 22, 23})
    assert stacks_of("T5-XL") == {"encoder.block": both, "decoder.block": both}


@pytest.mark.parametrize("name", list(PAPER_MODELS))
def test_the_last_block_ends_with_the_edited_layer(name):
    parts, edited = last_block(name), list(edited_layers(name))[-1]
    assert [part.edited for part in parts] == [False] * (len(parts) - 1) + [True]
    assert edited.endswith("." + parts[-1].names[0])
    assert [part.group for part in parts[-2:]] == ["feed-forward"] * 2
    assert parts[-1].shape == parts[-2].shape[::-1]


def test_parts_of_gpt_2():
    assert last_block("GPT-2") == [
        BlockPart("attn", ("c_attn",), (2304, 768), False),
        BlockPart("attn", ("c_proj",), (768, 768), False),
        BlockPart("feed-forward", ("mlp.c_fc",), (3072, 768), False),
        BlockPart("feed-forward", ("mlp.c_proj",), (768, 3072), True),
    ]


def test_names_and_shapes_are_written():
    drawn = texts(draw_architectures())
    for name in PAPER_MODELS:
        (*_, second) = last_block(name)
        assert name in drawn and second.names[0] in drawn and f"{second.shape[0]} × {second.shape[1]}" in drawn


def test_pieces():
    figure, axes = canvas(2, 1)
    box(axes, 0, 0, 1, 0.5, "a box", dashed=True, size=7)
    label(axes, 0.5, 0.9, "a label", ha="left")
    arrow(axes, (0, 0), (1, 1), bend=0.2)
    assert len(axes.patches) == 2 and texts(figure) == "a box\na label"
    assert tuple(figure.get_size_inches()) == (2, 1) == (axes.get_xlim()[1], axes.get_ylim()[1])
