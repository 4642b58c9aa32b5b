import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fluxflow_train import rng
from fluxflow_train.errors import UserError
from fluxflow_train.generation import (
    Request,
    Settings,
    encode,
    evaluating,
    generate,
    notes,
    refuse_untrained_null,
    render,
)
from fluxflow_train.models.text_to_image import TextToImage
from fluxflow_train.objectives import RectifiedFlow
from fluxflow_train.pixels import quantize
from fluxflow_train.sampling import Guidance, sample

SETTINGS = Settings(
    solver="euler",
    steps=4,
    guidance=Guidance(3.0, (0.0, 1.0), 0.0),
    height=16,
    width=16,
    seed=0,
    micro_batch=4,
)
HEART = Request("a red heart", "", 0)
OTHERS = [Request(f"a picture of the number {i}, {'very ' * i}long", "blue" * (i % 2), i) for i in range(6)]


@pytest.fixture
def three_threads() -> Iterator[None]:
    """A number that cuts tensors at odd places, where elementwise kernels round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_generation_is_the_sampler_and_the_decoder(model: TextToImage, objective: RectifiedFlow) -> None:
    (image,) = generate(model, objective, [HEART], SETTINGS)
    with torch.no_grad():
        noise = rng.normal(0, "sample-noise", [(0,)], (4, 4, 4))
        cond, null = model.text.encode(["a red heart"]), model.text.null(1, 1)
        z = sample(model.flow, objective, cond, null, noise, solver="euler", steps=4, guidance=SETTINGS.guidance)
        expected = quantize(model.vae.decode(z))[0]  # type: ignore[operator]
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
    assert (image.int() - expected.int()).abs().max() <= 1  # here texts were not padded
    assert image.float().std() > 1


@pytest.mark.parametrize("position", [0, 3, 6])
def test_an_image_does_not_depend_on_its_company(
    model: TextToImage, objective: RectifiedFlow, three_threads: None, position: int
) -> None:
    alone = generate(model, objective, [HEART], SETTINGS)[0]
    requests = [*OTHERS[:position], HEART, *OTHERS[position:]]
    together = generate(model, objective, requests, SETTINGS)
    assert together[position].equal(alone)
    assert len({image.numpy().tobytes() for image in together}) == 7
    backwards = generate(model, objective, requests[::-1], SETTINGS)
    assert backwards.flip(0).equal(together)


def test_micro_batches_are_of_one_image_on_a_cpu(model: TextToImage, objective: RectifiedFlow) -> None:
    shapes: set[tuple[int, ...]] = set()
    hook = model.flow.register_forward_pre_hook(lambda _, inputs: shapes.add((len(inputs[0]), *inputs[2].mask.shape)))
    generate(model, objective, [HEART, *OTHERS], SETTINGS)
    hook.remove()
    assert shapes == {(2, 2, 16), (2, 2, 64)}


def test_every_part_of_a_request_matters(model: TextToImage, objective: RectifiedFlow) -> None:
    requests = [HEART, Request("a blue star", "", 0), Request("a red heart", "ugly", 0), Request("a red heart", "", 1)]
    images = generate(model, objective, requests, SETTINGS)
    others = [
        generate(model, objective, [HEART], dataclasses.replace(SETTINGS, **change))[0]
        for change in ({"seed": 1}, {"steps": 5}, {"solver": "heun"}, {"guidance": Guidance(5.0, (0.0, 1.0), 0.0)})
    ]
    assert len({image.numpy().tobytes() for image in [*images, *others]}) == 8
    tall = generate(model, objective, [HEART], dataclasses.replace(SETTINGS, height=24))
    assert tall.shape == (1, 3, 24, 16)


def test_an_empty_prompt_is_the_null_condition(model: TextToImage, objective: RectifiedFlow) -> None:
    assert encode(model.text, " \n").pooled.equal(model.text.null(1, 1).pooled)
    empty, blank = generate(model, objective, [Request("", "", 0), Request(" ", "", 0)], SETTINGS)
    without_guidance = dataclasses.replace(SETTINGS, guidance=Guidance(1.0, (0.0, 1.0), 0.0))
    plain = generate(model, objective, [Request("", "", 0)], without_guidance)[0]
    assert empty.equal(blank)
    assert (empty.int() - plain.int()).abs().max() <= 1  # guidance from nothing to nothing


def test_layout_mode_and_autocast_around_it_change_nothing(model: TextToImage, objective: RectifiedFlow) -> None:
    expected = generate(model, objective, [HEART], SETTINGS)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.flow.train()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            assert generate(model, objective, [HEART], SETTINGS).equal(expected)
        assert torch.get_float32_matmul_precision() == "medium"
        assert model.flow.training and not model.vae.training
    finally:
        torch.set_float32_matmul_precision("highest")
        model.eval()


def test_mode_returns_after_an_error(model: TextToImage) -> None:
    model.text.train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.text.training
        raise ZeroDivisionError
    assert model.text.training and not model.flow.training
    model.eval()


def test_given_noise_is_used(model: TextToImage, objective: RectifiedFlow) -> None:
    noise = rng.normal(0, "sample-noise", [(0,), (1,)], (4, 4, 4))
    requests = [HEART, HEART._replace(index=1)]
    assert render(model, objective, requests, noise, SETTINGS).equal(generate(model, objective, requests, SETTINGS))
    assert not render(model, objective, requests, noise.flip(0), SETTINGS).equal(
        generate(model, objective, requests, SETTINGS)
    )


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 4), ("heun", 7)])
def test_progress_counts_evaluations(
    model: TextToImage, objective: RectifiedFlow, solver: str, evaluations: int
) -> None:
    seen: list[tuple[int, int]] = []
    settings = dataclasses.replace(SETTINGS, solver=solver)
    generate(model, objective, [HEART, *OTHERS[:1]], settings, lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, 2 * evaluations) for i in range(2 * evaluations)]


@pytest.mark.parametrize(
    "prompt", ["❤️🔥", "ein rotes Herz, 红心, сердце", "\ud800 half a pair", "a" * 10_000, "\0", "e" * 512]
)
def test_any_text_is_drawn(model: TextToImage, objective: RectifiedFlow, prompt: str) -> None:
    images = generate(model, objective, [Request(prompt, "", 0), HEART], SETTINGS)
    assert not images[0].equal(images[1])
    assert images[1].equal(generate(model, objective, [HEART], SETTINGS)[0])


def test_a_text_that_is_too_long_is_noted(model: TextToImage) -> None:
    (note,) = notes(model.text, ["short", "long " * 2000, "", "long " * 2000])
    assert note.startswith('the prompt "long long') and "(10,000 characters) fills all 512 tokens" in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0, micro_batch=4: both must be at least 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"guidance": Guidance(float("nan"), (0.0, 1.0), 0.0)}, "guidance=nan must be a number"),
        ({"guidance": Guidance(-1.0, (0.0, 1.0), 0.0)}, "guidance=-1.0 must be a number"),
        ({"guidance": Guidance(3.0, (0.5, 0.4), 0.0)}, "guidance interval 0.5, 0.4"),
        ({"guidance": Guidance(3.0, (0.0, 1.0), 1.5)}, "guidance rescale 1.5"),
        ({"height": 18}, "height=18 width=16 can't be drawn: both must be multiples of 4"),
        ({"width": 0}, "height=16 width=0 can't be drawn"),
        ({"solver": "ddim"}, "solver=ddim is none of ours"),
    ],
)
def test_what_cannot_be_drawn_is_said(model: TextToImage, objective: RectifiedFlow, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        generate(model, objective, [HEART], dataclasses.replace(SETTINGS, **change))


def test_a_null_condition_that_was_never_learned_is_refused() -> None:
    plain = Guidance(1.0, (0.0, 1.0), 0.0)
    refuse_untrained_null(0.0, plain, ["a red heart"])
    refuse_untrained_null(0.1, SETTINGS.guidance, ["a red heart", ""])
    with pytest.raises(UserError, match=r"^guidance=3 needs a model .* cfg_dropout_prob=0:"):
        refuse_untrained_null(0.0, SETTINGS.guidance, ["a red heart"])
    with pytest.raises(UserError, match=r"^an empty prompt needs a model"):
        refuse_untrained_null(0.0, plain, ["a red heart", " "])


def test_noise_is_of_seed_and_index(model: TextToImage, objective: RectifiedFlow) -> None:
    def first_input(requests: list[Request], settings: Settings) -> list[Tensor]:
        seen: list[Tensor] = []
        hook = model.flow.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].clone()))
        generate(model, objective, requests, settings)
        hook.remove()
        return seen[:: SETTINGS.steps]

    expected = rng.normal(7, "sample-noise", [(5,), (0,)], (4, 4, 4))
    found = first_input([HEART._replace(index=5), HEART], dataclasses.replace(SETTINGS, seed=7))
    torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=0)
