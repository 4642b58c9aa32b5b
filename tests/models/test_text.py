import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.ablation.cost import flops, parameters
from fluxflow_train.ablation.matching import match
from fluxflow_train.errors import UserError
from fluxflow_train.models.activations import ARM_NAMES
from fluxflow_train.models.text import Backbone, TextEncoder, TextFeatures
from fluxflow_train.models.text_scratch import ScratchBackbone

CAPTIONS = [
    "a red circle above a blue square",
    "",
    "🙂🎨🚀",
    "grüner Kreis, 赤い円, круг",
    "word " * 2000,
    "circle",
]


class Letters(Backbone):
    """A backbone that is simple enough to compute by hand: a fixed random vector per letter."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width, max_tokens=32)
        self.register_buffer("table", torch.randn(256, width, generator=torch.Generator().manual_seed(0)))

    @property
    def fingerprint(self) -> str:
        return "0" * 64

    def token_ids(self, caption: str) -> list[int]:
        return [1, *caption.encode()[:30], 2]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.table[ids]  # type: ignore[index]


def encoder(activation: str = "bezier", backbone: Backbone | None = None) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(backbone or Letters(), width=8, hidden=16, activation=activation)


def hidden_states(batch: int, tokens: int, width: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def until(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_projection_and_pooling_by_hand() -> None:
    text = encoder("relu")
    hidden, mask = hidden_states(2, 5), until([5, 2])
    features = text(hidden, mask)
    norm, first, _, last = text.projection
    for i, length in enumerate([5, 2]):
        x = hidden[i, :length].double()
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        x = 2**0.5 * torch.relu(x @ first.weight.T.double() + first.bias.double())
        x = x @ last.weight.T.double() + last.bias.double()
        torch.testing.assert_close(features.tokens[i, :length].double(), x, rtol=0, atol=1e-5)
        mean = x.mean(0)
        pooled = (mean - mean.mean()) / (mean.var(unbiased=False) + text.pooled_norm.eps).sqrt()
        torch.testing.assert_close(features.pooled[i].double(), pooled, rtol=0, atol=1e-4)
    assert features.tokens[1, 2:].eq(0).all()
    assert features.mask is mask


def test_padding_never_counts() -> None:
    text = encoder()
    hidden = hidden_states(3, 9)
    padded = text(hidden, until([9, 4, 1]))
    other = text(hidden.masked_fill(~until([9, 4, 1])[..., None], 77.0), until([9, 4, 1]))
    for a, b in zip(padded, other, strict=True):
        assert torch.equal(a, b)
    for i, length in enumerate([9, 4, 1]):
        alone = text(hidden[i : i + 1, :length], until([length]))
        torch.testing.assert_close(padded.tokens[i, :length], alone.tokens[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(padded.pooled[i], alone.pooled[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ARM_NAMES)
def test_unit_scale_at_the_start(activation: str) -> None:
    torch.manual_seed(0)
    text = TextEncoder(Letters(96), width=64, hidden=128, activation=activation)
    with torch.no_grad():
        features = text(hidden_states(32, 10, 96) * 5 + 1, torch.ones(32, 10, dtype=torch.bool))
        null = text.null(32, 10)
    for x in (features.tokens, features.pooled, null.tokens[:, 0], null.pooled):
        assert 0.7 < x.square().mean().sqrt() < 1.4


def test_null_is_one_token_and_stands_for_all_three() -> None:
    text = encoder()
    null = text.null(3, 7)
    assert null.tokens.shape == (3, 7, 8)
    assert null.mask.tolist() == [[True, *[False] * 6]] * 3
    assert torch.equal(null.tokens[1, 0], text.null_token)
    assert null.tokens[:, 1:].eq(0).all()
    assert torch.equal(null.pooled[2], text.null_pooled)


def test_drop_is_per_sample() -> None:
    text = encoder()
    features = text(hidden_states(4, 6), until([6, 3, 5, 1]))
    dropped = torch.tensor([False, True, True, False])
    mixed, null = text.drop(features, dropped), text.null(4, 6)
    for i, drop in enumerate(dropped.tolist()):
        for ours, kept, replaced in zip(mixed, features, null, strict=True):
            assert torch.equal(ours[i], replaced[i] if drop else kept[i])


def test_drop_keeps_the_precision() -> None:
    text = encoder()
    features = text(hidden_states(2, 3), until([3, 3]))
    low = TextFeatures(features.tokens.bfloat16(), features.mask, features.pooled)
    mixed = text.drop(low, torch.tensor([True, False]))
    assert mixed.tokens.dtype == torch.bfloat16
    assert mixed.pooled.dtype == torch.float32


def test_encode_is_tokenize_backbone_projection() -> None:
    text = encoder()
    captions = ["abc", "", "a longer one"]
    encoded = text.encode(captions)
    ids, mask = text.backbone.tokenize(captions)
    expected = text(text.backbone(ids, mask), mask)
    assert torch.equal(encoded.mask, expected.mask)
    torch.testing.assert_close(encoded.tokens, expected.tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoded.pooled, expected.pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("company", [CAPTIONS[::-1], [*"abcdefghij", *CAPTIONS], CAPTIONS[:1] * 30])
def test_a_caption_does_not_see_its_company(company: list[str]) -> None:
    text = encoder(backbone=ScratchBackbone(32, num_layers=2, num_heads=4, hidden=32, activation="bezier"))
    with torch.no_grad():
        alone = text.encode(CAPTIONS[:1])
        together = text.encode(company)
    length, i = alone.tokens.shape[1], company.index(CAPTIONS[0])
    assert torch.equal(together.tokens[i, :length], alone.tokens[0])
    assert together.mask[i].sum() == length
    assert torch.equal(together.pooled[i], alone.pooled[0])


def test_tokenize_pads_to_the_longest_and_not_beyond() -> None:
    ids, mask = Letters().tokenize(["ab", ""])
    assert ids.tolist() == [[1, 97, 98, 2], [1, 2, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("activation", ARM_NAMES)
def test_gradient_reaches_every_parameter(activation: str) -> None:
    text = encoder(activation, ScratchBackbone(16, num_layers=2, num_heads=2, hidden=16, activation=activation))
    ids, mask = text.backbone.tokenize(["a red circle", "blue", "unseen"])
    features = text.drop(text(text.backbone(ids, mask), mask), torch.tensor([False, False, True]))
    (features.tokens.square().sum() + features.pooled.pow(3).sum()).backward()
    for name, p in text.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


class TestScratch:
    def backbone(self) -> ScratchBackbone:
        torch.manual_seed(0)
        return ScratchBackbone(32, num_layers=2, num_heads=4, hidden=32, activation="bezier")

    @pytest.mark.parametrize("caption", CAPTIONS)
    def test_any_caption(self, caption: str) -> None:
        backbone = self.backbone()
        ids, mask = backbone.tokenize([caption])
        assert ids.tolist() == [[256, *caption.encode()[:510], 257]]
        assert backbone(ids, mask).isfinite().all()

    def test_a_lone_surrogate_is_a_question_mark(self) -> None:
        assert self.backbone().tokenize(["a\udc80"])[0].tolist() == [[256, 97, 63, 257]]

    def test_padding_never_counts(self) -> None:
        backbone = self.backbone()
        ids, mask = backbone.tokenize(["circle", "a red circle"])
        changed = torch.where(mask, ids, 65)
        a, b = backbone(ids, mask), backbone(changed, mask)
        assert torch.equal(a[mask], b[mask])
        alone = backbone(*backbone.tokenize(["circle"]))
        torch.testing.assert_close(a[0, : alone.shape[1]], alone[0], rtol=0, atol=2e-6)

    def test_attention_is_torchs(self) -> None:
        block = self.backbone().blocks[0]
        reference = nn.MultiheadAttention(32, 4, batch_first=True)
        with torch.no_grad():
            reference.in_proj_weight.copy_(block.qkv.weight)
            reference.out_proj.weight.copy_(block.out.weight)
            x, mask = hidden_states(2, 6, 32), until([6, 3])
            y = block.norm1(x)
            x2 = x + reference(y, y, y, key_padding_mask=~mask)[0]
            expected = x2 + block.feed_forward(block.norm2(x2))
            torch.testing.assert_close(block(x, mask)[mask], expected[mask], rtol=0, atol=1e-5)

    def test_order_of_words_counts(self) -> None:
        text = encoder(backbone=self.backbone())
        with torch.no_grad():
            a, b = text.encode(["red on blue", "blue on red"]).pooled
        assert (a - b).abs().max() > 0.01

    def test_it_is_trained_and_saved(self) -> None:
        text = encoder(backbone=self.backbone())
        assert not text.backbone.frozen
        assert any(name.startswith("backbone.blocks.1.") for name in text.state_dict())

    def test_its_fingerprint_is_the_vocabularys(self) -> None:
        other = ScratchBackbone(16, num_layers=1, num_heads=2, hidden=8, activation="relu")
        assert self.backbone().fingerprint == other.fingerprint
        assert len(other.fingerprint) == 64

    def test_heads_must_divide(self) -> None:
        with pytest.raises(ValueError, match="got 32 with 5 heads"):
            ScratchBackbone(32, num_layers=1, num_heads=5, hidden=8, activation="relu")


def test_fingerprint_is_checked() -> None:
    text = encoder()
    text.check_fingerprint("0" * 64)
    with pytest.raises(UserError, match=r"fingerprint 000000000000, expected ab") as error:
        text.check_fingerprint("ab" * 32)
    assert "\n" not in str(error.value)


class Network(nn.Module):
    def __init__(self, activation: str, text: list[int]) -> None:
        super().__init__()
        self.text = TextEncoder(Letters(384), width=128, hidden=text[0], activation=activation)

    def forward(self, hidden: Tensor, mask: Tensor) -> TextFeatures:
        return self.text(hidden, mask)


@pytest.mark.parametrize("by", ["parameters", "flops"])
@pytest.mark.parametrize("activation", [name for name in ARM_NAMES if name != "bezier"])
def test_every_arm_can_be_matched(activation: str, by: str) -> None:
    with torch.device("meta"):
        reference = Network("bezier", [128])

    def inputs(network: nn.Module) -> tuple[Tensor, ...]:
        return torch.zeros(1, 16, 384), torch.ones(1, 16, dtype=torch.bool)

    def build(text: list[int]) -> nn.Module:
        return Network(activation, text)

    found = match(build, reference, widths={"text": [128]}, inputs=inputs, by=by)  # type: ignore[arg-type]
    count = parameters if by == "parameters" else lambda network: flops(network, inputs)
    with torch.device("meta"):
        ours = count(Network(activation, found.widths["text"]))
    assert abs(ours["text"] / count(reference)["text"] - 1) < 0.01
