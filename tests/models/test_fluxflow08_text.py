from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel

from fluxflow_train.errors import UserError
from fluxflow_train.interop import keys08
from fluxflow_train.interop.keys08_flow import projection_entries
from fluxflow_train.models.fluxflow08_text import DISTILBERT_BASE, FluxFlow08Text
from fluxflow_train.models.text_backbones import Checkpoint, FrozenBackbone, PretrainedBackbone, TrainedBackbone

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
WIDTH = 48
FIELDS = DISTILBERT_BASE | {"vocab_size": 8, "n_layers": 1, "hidden_dim": 64, "max_position_embeddings": 32}
CAPTIONS = ["a red circle", "", "blue blue blue blue", "red " * 50]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One layer of DistilBERT at its width, and a tokenizer of eight words."""
    folder = tmp_path_factory.mktemp("distilbert")
    torch.manual_seed(0)
    network = DistilBertModel(DistilBertConfig(**FIELDS))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors"
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "blue"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    return Checkpoint(folder, FIELDS, lambda state: state)


def build(backbone: PretrainedBackbone, num_tokens: int = 24) -> FluxFlow08Text:
    torch.manual_seed(1)
    text = FluxFlow08Text(backbone, WIDTH, num_tokens)
    with torch.no_grad():
        for parameter in text.projection.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return text.eval()


@pytest.fixture
def trained(checkpoint: Checkpoint) -> FluxFlow08Text:
    return build(TrainedBackbone(checkpoint))


@pytest.fixture
def frozen(checkpoint: Checkpoint) -> FluxFlow08Text:
    return build(FrozenBackbone(checkpoint))


@pytest.fixture(scope="module")
def peer_class() -> Any:
    models: Any = pytest.importorskip("fluxflow.models", reason="the peer fluxflow==0.8.1 is not installed")
    return models.BertTextEncoder


def padded(text: FluxFlow08Text) -> tuple[Tensor, Tensor]:
    """ids and mask as the package's pipeline makes them: all captions of one length."""
    ids, mask = text.backbone.tokenize(CAPTIONS)
    missing = text.backbone.max_tokens - ids.shape[1]
    return torch.nn.functional.pad(ids, (0, missing)), torch.nn.functional.pad(mask, (0, missing))


@pytest.mark.parametrize("num_tokens", [24, 32])
def test_same_numbers_as_the_package(num_tokens: int, checkpoint: Checkpoint, peer_class: Any) -> None:
    torch.manual_seed(2)
    theirs = peer_class(WIDTH)
    backbone = TrainedBackbone(checkpoint)
    theirs.language_model = backbone.network
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.ouput_layer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    text = FluxFlow08Text(backbone, WIDTH, num_tokens).eval()
    like = text.projection.state_dict()
    text.projection.load_state_dict(keys08.to_ours(projection_entries(), theirs.state_dict(), like))
    ids, mask = padded(text)
    assert ids.shape == (4, num_tokens) and mask.sum(1).tolist() == [5, 2, 6, num_tokens]
    for dtype, tolerance in TOLERANCE.items():
        theirs.to(dtype)
        text.to(dtype)
        with torch.no_grad():
            expected = theirs(ids, attention_mask=mask.long())
            hidden = text.backbone(*text.backbone.tokenize(CAPTIONS))
            found = text(hidden, mask[:, :1]).pooled
            assert (found - expected).abs().max() <= tolerance
            states = backbone.network(input_ids=ids, attention_mask=mask).last_hidden_state
            assert (text(states, mask).pooled - expected).abs().max() <= tolerance
        assert expected.std(0).max() > 0.01


def test_the_map_holds_every_key(peer_class: Any, trained: FluxFlow08Text) -> None:
    back = keys08.to_theirs(projection_entries(), trained.projection.state_dict())
    theirs = {name: t for name, t in peer_class(WIDTH).state_dict().items() if not name.startswith("language_model.")}
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in theirs.items()}
    assert {entry.ours for entry in projection_entries()} == set(trained.projection.state_dict())


def test_the_length_of_the_padding_counts(checkpoint: Checkpoint) -> None:
    short, long = build(FrozenBackbone(checkpoint), 24), build(FrozenBackbone(checkpoint), 32)
    with torch.no_grad():
        assert not torch.allclose(
            short.encode(["a red circle"]).pooled, long.encode(["a red circle"]).pooled, atol=1e-4
        )
    assert short.backbone.fingerprint != long.backbone.fingerprint
    assert len(short.backbone.fingerprint) == 64
    with pytest.raises(ValueError, match="got 33, expected 2 to 32"):
        build(FrozenBackbone(checkpoint), 33)


def test_a_caption_that_is_too_long_keeps_its_end(frozen: FluxFlow08Text) -> None:
    ids = frozen.backbone.token_ids("red " * 50)
    assert ids == [2, *[5] * 22, 3]


def test_a_caption_does_not_see_its_company(frozen: FluxFlow08Text) -> None:
    together = frozen.encode(CAPTIONS)
    assert together.tokens.shape == (4, 1, WIDTH) and together.mask.all() and together.mask.shape == (4, 1)
    for i, caption in enumerate(CAPTIONS):
        assert torch.equal(frozen.encode([caption]).pooled[0], together.pooled[i])
    hidden, mask = frozen.backbone.encode(CAPTIONS)
    assert hidden.shape == (4, 1, 768) and mask.shape == (4, 1)
    torch.testing.assert_close(frozen(hidden, mask).pooled, together.pooled, rtol=0, atol=1e-6)


def test_null_is_the_empty_caption(frozen: FluxFlow08Text) -> None:
    null, empty = frozen.null(3, 5), frozen.encode([""])
    torch.testing.assert_close(null.pooled, empty.pooled.expand(3, -1), rtol=0, atol=1e-6)
    assert torch.equal(null.mask, torch.tensor([[True] + [False] * 4] * 3))
    torch.testing.assert_close(null.tokens[:, 0], null.pooled, rtol=0, atol=0)
    assert null.tokens[:, 1:].eq(0).all()


def test_drop(frozen: FluxFlow08Text) -> None:
    features = frozen.encode(CAPTIONS)
    dropped = frozen.drop(features, torch.tensor([True, False, True, False]))
    assert torch.equal(dropped.pooled[[1, 3]], features.pooled[[1, 3]])
    torch.testing.assert_close(dropped.pooled[[0, 2]], frozen.null(2, 1).pooled, rtol=0, atol=0)
    assert torch.equal(dropped.tokens[:, 0], dropped.pooled) and dropped.mask.all()


def test_a_null_first_asked_for_in_inference_mode_can_be_trained(frozen: FluxFlow08Text) -> None:
    with torch.inference_mode():
        frozen.null(1, 1)
    frozen.null(2, 1).pooled.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in frozen.parameters())


def test_gradients_reach_a_trained_backbone(trained: FluxFlow08Text) -> None:
    hidden = trained.backbone(*trained.backbone.tokenize(CAPTIONS))
    features = trained.drop(
        trained(hidden, torch.ones(4, 1, dtype=torch.bool)), torch.tensor([True, False, False, False])
    )
    (features.pooled * torch.randn(4, WIDTH)).sum().backward()
    unused = "position_embeddings"  # of positions beyond the padding
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in trained.named_parameters() if unused not in n)


def test_what_is_saved(frozen: FluxFlow08Text, trained: FluxFlow08Text) -> None:
    """A frozen backbone is not in the state and its weights are in the fingerprint; a trained one the other way."""
    assert not any("backbone" in name for name in frozen.state_dict())
    assert any("backbone" in name for name in trained.state_dict())
    frozen.check_fingerprint(frozen.backbone.fingerprint)
    with pytest.raises(UserError, match="not the one that this model was trained with"):
        frozen.check_fingerprint(trained.backbone.fingerprint)
