import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, CLIPConfig, CLIPModel

from fluxflow_train.errors import UserError
from fluxflow_train.metrics.clip_score import MEAN, STD, ClipScore, preprocessed

SIDE, MAX_TOKENS = 32, 8
WORDS = ["<start>", "<end>", "<unknown>", "a", "red", "blue", "cat", "dog", "house", "on", "the", "hill"]
CAPTIONS = ["a red cat", "the blue dog on the hill", "house", "a house on the hill", ""]


def fill(model: CLIPModel) -> None:
    """Weights large enough for captions and pictures to differ, from a generator of its own."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("class_embedding"):
            parameter.data.normal_(std=0.3, generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": MAX_TOKENS, "bos_token_id": 0}
    text |= {"eos_token_id": 1, "pad_token_id": 1, "attention_dropout": 0.5}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    fill(model)
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def score(folder: Path) -> ClipScore:
    return ClipScore(folder)


def pictures(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(len(CAPTIONS), 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").mul(255).clamp(0, 255).byte()


def prepared(pixels: Tensor) -> np.ndarray:
    """PIL's resizing and cropping of one picture (3, H, W), normalised: (3, S, S)."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    short = min(picture.size)
    width, height = (side * SIDE // short for side in picture.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    cropped = np.asarray(picture.crop((left, top, left + SIDE, top + SIDE))) / 255
    return ((cropped - MEAN) / STD).transpose(2, 0, 1)


def reference(folder: Path, images: Tensor, captions: list[str]) -> list[float]:
    """Each pair alone: tokens counted by hand, no padding, cosines in numpy."""
    model = CLIPModel.from_pretrained(folder).eval()
    scores = []
    for pixels, caption in zip(images, captions, strict=True):
        words = [WORDS.index(word) for word in caption.split()]
        ids = torch.tensor([[0, *words[: MAX_TOKENS - 2], 1]])
        with torch.no_grad():
            a = model.get_image_features(torch.from_numpy(prepared(pixels))[None].float()).pooler_output[0].numpy()
            b = model.get_text_features(ids).pooler_output[0].numpy()
        scores.append(100 * max(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), 0))
    return scores


def test_scores_are_clamped_cosines(folder: Path, score: ClipScore) -> None:
    images = pictures(SIDE, SIDE)
    values = score(images, CAPTIONS)
    expected = reference(folder, images, CAPTIONS)
    assert values.shape == (5,) and values.dtype == torch.float32 and not values.requires_grad
    assert values.tolist() == pytest.approx(expected, abs=1e-3)
    assert 0 in expected and max(expected) > 5  # both sides of the clamp


@pytest.mark.parametrize("size", [(64, 64), (50, 75), (90, 41), (20, 20)])
def test_pictures_are_resized_and_cropped_as_pil_does(size: tuple[int, int]) -> None:
    """To one level of 255: PIL rounds between the two directions too."""
    images = pictures(*size)
    expected = np.stack([prepared(pixels) for pixels in images])
    levels = np.abs(preprocessed(images, SIDE).numpy() - expected) * np.array(STD)[:, None, None] * 255
    assert levels.max() < 1.01


def test_long_captions_are_cut(folder: Path, score: ClipScore) -> None:
    caption = "a red cat on the hill the blue dog on the house"
    images = pictures(SIDE, SIDE)[:1]
    assert score(images, [caption]).tolist() == pytest.approx(reference(folder, images, [caption]), abs=1e-3)


def test_a_score_does_not_depend_on_its_batch_or_mode(score: ClipScore) -> None:
    images, captions = pictures(SIDE, SIDE).repeat(5, 1, 1, 1), CAPTIONS * 5
    whole = score.train()(images, captions)
    torch.testing.assert_close(whole[20:], whole[:5], rtol=0, atol=1e-4)  # in another piece
    torch.testing.assert_close(score(images[1:2], captions[1:2]), whole[1:2], rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(images, captions), whole)


def test_no_global_draws(folder: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ClipScore(folder)(pictures(SIDE, SIDE), CAPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_arguments(score: ClipScore) -> None:
    assert score(pictures(SIDE, SIDE)[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="4 captions"):
        score(pictures(SIDE, SIDE), CAPTIONS[:4])
    with pytest.raises(ValueError, match=r"expected uint8 images"):
        score(pictures(SIDE, SIDE).float(), CAPTIONS)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "clip"))


def test_no_clip_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-clip", "not a name/of a/model"):
        with pytest.raises(UserError, match=r"neither a folder nor a CLIP .*: give a folder") as error:
            ClipScore(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_files(name: str, folder: Path, tmp_path: Path) -> None:
    """Pickled weights beside them do not help."""
    path = copied(folder, tmp_path)
    torch.save({}, path / "pytorch_model.bin")
    (path / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}"):
        ClipScore(path)


def test_damaged_and_foreign_models(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path)
    weights = path / "model.safetensors"
    whole = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        ClipScore(path)
    del whole["text_projection.weight"]
    save_file(whole, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights"):
        ClipScore(path)
    BertConfig().save_pretrained(path)
    with pytest.raises(UserError, match="is no CLIP"):
        ClipScore(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        ClipScore(path)
