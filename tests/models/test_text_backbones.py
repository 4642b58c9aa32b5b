import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertModel, DistilBertConfig, DistilBertForMaskedLM, DistilBertModel

from fluxflow_train.errors import UserError
from fluxflow_train.models import text_backbones
from fluxflow_train.models.text import TextEncoder
from fluxflow_train.models.text_backbones import FrozenBackbone, TrainedBackbone, distilbert, minilm

CAPTIONS = [
    "a red circle above a blue square",
    "",
    "🙂🎨🚀",
    "grüner Kreis, 赤い円, круг",
    "word " * 2000,
    "circle",
]


@pytest.fixture(scope="module")
def frozen() -> FrozenBackbone:
    return FrozenBackbone(minilm())


@pytest.fixture(scope="module")
def bert() -> BertModel:
    return BertModel.from_pretrained(minilm().folder).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small DistilBERT with a head, as `save_pretrained` writes it, and a tokenizer with padding baked in."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "blue"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    tokenizer.enable_padding(length=50)
    config = DistilBertConfig(
        vocab_size=8, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=24, pad_token_id=0
    )
    torch.manual_seed(0)
    place = tmp_path / "distilbert"
    DistilBertForMaskedLM(config).save_pretrained(place)
    tokenizer.save(str(place / "tokenizer.json"))
    return place


def outputs(network: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return network(input_ids=ids, attention_mask=mask).last_hidden_state


class TestMiniLM:
    def test_numbers_are_the_original_berts(self, frozen: FrozenBackbone, bert: BertModel) -> None:
        captions = [caption[:600] for caption in CAPTIONS]
        ids, mask = frozen.tokenize(captions)
        difference = (frozen(ids, mask) - outputs(bert, ids, mask))[mask]
        assert difference.abs().max() <= 5e-6

    def test_encode_is_berts_without_padding(self, frozen: FrozenBackbone, bert: BertModel) -> None:
        hidden, mask = frozen.encode(["a red circle", "", "a red circle above a blue square"])
        for i, caption in enumerate(["a red circle", ""]):
            expected = outputs(bert, *frozen.tokenize([caption]))[0]
            torch.testing.assert_close(hidden[i, : len(expected)], expected, rtol=0, atol=5e-6)
            assert hidden[i, len(expected) :].eq(0).all()
            assert mask[i].sum() == len(expected)

    def test_a_caption_does_not_see_its_company(self, frozen: FrozenBackbone) -> None:
        alone = frozen.encode(["a red circle"])[0][0]
        for company in (["a blue circle", "a red circle", "", "x y z w"], ["a red circle"] * 60, ["a b c"] * 70):
            company = [*company, "a red circle"]
            hidden, _ = frozen.encode(company)
            for i in (company.index("a red circle"), -1):
                assert torch.equal(hidden[i, : len(alone)], alone)

    def test_padding_is_to_the_longest(self, frozen: FrozenBackbone) -> None:
        ids, mask = frozen.tokenize(["circle", ""])
        assert ids.tolist() == [[101, 4418, 102], [101, 102, 0]]
        assert mask.tolist() == [[True, True, True], [True, True, False]]

    def test_any_caption(self, frozen: FrozenBackbone) -> None:
        lengths = {caption: len(frozen.token_ids(caption)) for caption in [*CAPTIONS, "\x00", " ", "a\udc80"[:1]]}
        assert lengths[""] == lengths["\x00"] == lengths[" "] == 2
        assert lengths["word " * 2000] == 512
        assert lengths["🙂🎨🚀"] >= 3
        assert all(2 <= length <= 512 for length in lengths.values())
        assert frozen.tokenize(["a\udc80"])[0].shape == (1, 4)  # a lone surrogate is a question mark

    def test_attention_is_fused_and_nothing_is_dropped(self, frozen: FrozenBackbone) -> None:
        network = frozen.network()
        assert network.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
        assert not network.training
        assert all(m.p == 0 for m in network.modules() if isinstance(m, torch.nn.Dropout))

    def test_loading_draws_nothing(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        FrozenBackbone(minilm()).encode(["circle"])
        assert torch.equal(torch.rand(2), expected)

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_backbones, "MINILM", "no-such-package-of-ours")
        with pytest.raises(UserError, match=r'pip install "fluxflow-train\[demo\]"') as error:
            minilm()
        assert "\n" not in str(error.value)


class TestFrozen:
    def encoder(self, backbone: FrozenBackbone) -> TextEncoder:
        torch.manual_seed(0)
        return TextEncoder(backbone, width=32, hidden=32, activation="bezier")

    def test_it_is_neither_saved_nor_trained(self, frozen: FrozenBackbone) -> None:
        text = self.encoder(frozen)
        text.train()
        features = text.encode(["circle"])
        features.tokens.square().sum().backward()
        assert frozen.frozen
        assert not any(name.startswith("backbone") for name in text.state_dict())
        assert not list(text.backbone.parameters())
        assert all(p.grad is None for p in frozen.network().parameters())
        assert text.projection[1].weight.grad.abs().sum() > 0  # type: ignore[union-attr]

    def test_nothing_is_loaded_before_it_runs(self, folder: Path) -> None:
        backbone = FrozenBackbone(distilbert(str(folder)))
        text = self.encoder(backbone)
        (folder / "model.safetensors").rename(folder / "away")
        assert (text.backbone.width, text.backbone.max_tokens) == (16, 24)
        with torch.device("meta"):
            self.encoder(backbone)
        text(torch.zeros(2, 3, 16), torch.ones(2, 3, dtype=torch.bool))
        (folder / "away").rename(folder / "model.safetensors")
        assert text.encode(["a red circle"]).tokens.shape == (1, 5, 32)

    def test_it_follows_the_device(self, folder: Path) -> None:
        backbone = FrozenBackbone(distilbert(str(folder)))
        text = self.encoder(backbone)
        assert backbone.network().get_parameter("embeddings.LayerNorm.weight").device.type == "cpu"
        text.to("meta")
        assert all(tensor.is_meta for tensor in backbone.tokenize(["a"]))
        assert backbone.network().get_parameter("embeddings.LayerNorm.weight").is_meta

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_gpu_computes_the_same(self, frozen: FrozenBackbone) -> None:
        on_cpu = self.encoder(frozen).encode(CAPTIONS)
        on_gpu = self.encoder(FrozenBackbone(minilm())).cuda().encode(CAPTIONS)
        for a, b in zip(on_gpu, on_cpu, strict=True):
            assert a.is_cuda
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-3)

    def test_precision_is_full_under_autocast(self, frozen: FrozenBackbone) -> None:
        ids, mask = frozen.tokenize(["a red circle"])
        with torch.autocast("cpu", torch.bfloat16):
            low = frozen(ids, mask)
        assert torch.equal(low, frozen(ids, mask))


class TestTrained:
    @pytest.fixture
    def text(self, folder: Path) -> TextEncoder:
        torch.manual_seed(0)
        return TextEncoder(TrainedBackbone(distilbert(str(folder))), width=8, hidden=16, activation="silu")

    def test_it_starts_at_the_checkpoint(self, text: TextEncoder, folder: Path) -> None:
        reference = DistilBertModel.from_pretrained(folder).eval()
        ids, mask = text.backbone.tokenize(["a red circle", "blue"])
        torch.testing.assert_close(
            text.backbone(ids, mask)[mask], outputs(reference, ids, mask)[mask], rtol=0, atol=1e-6
        )
        assert not text.backbone.frozen

    def test_it_is_saved_and_trained(self, text: TextEncoder) -> None:
        ids, mask = text.backbone.tokenize(["a red circle", "blue"])
        features = text(text.backbone(ids, mask), mask)
        (features.tokens.square().sum() + features.pooled.pow(3).sum()).backward()
        parameters = dict(text.backbone.named_parameters())
        assert len(parameters) == 36
        assert set(parameters) == {n.removeprefix("backbone.") for n in text.state_dict() if n.startswith("backbone.")}
        assert not [name for name, p in parameters.items() if p.grad is None]

    def test_on_the_meta_device_it_has_no_weights(self, folder: Path) -> None:
        with torch.device("meta"):
            backbone = TrainedBackbone(distilbert(str(folder)))
        assert all(p.is_meta for p in backbone.parameters())
        assert sum(p.numel() for p in backbone.parameters()) > 4000


class TestFingerprint:
    def test_is_of_weights_and_tokenizer_where_frozen(self, folder: Path) -> None:
        before = FrozenBackbone(distilbert(str(folder))).fingerprint
        assert len(before) == 64
        for name in ("model.safetensors", "tokenizer.json"):
            copy = folder.with_name(f"other-{name}")
            shutil.copytree(folder, copy)
            assert FrozenBackbone(distilbert(str(copy))).fingerprint == before
            data = bytearray((copy / name).read_bytes())
            data[-20] ^= 1
            (copy / name).write_bytes(data)
            assert FrozenBackbone(distilbert(str(copy))).fingerprint != before

    def test_is_of_the_tokenizer_alone_where_trained(self, folder: Path) -> None:
        before = TrainedBackbone(distilbert(str(folder))).fingerprint
        torch.manual_seed(1)
        config = DistilBertConfig(**json.loads((folder / "config.json").read_text()))
        DistilBertForMaskedLM(config).save_pretrained(folder)
        assert TrainedBackbone(distilbert(str(folder))).fingerprint == before
        assert before != FrozenBackbone(distilbert(str(folder))).fingerprint


class TestDistilBert:
    def test_equals_transformers(self, folder: Path) -> None:
        backbone = FrozenBackbone(distilbert(str(folder)))
        ids, mask = backbone.tokenize(["a red circle", "blue", ""])
        assert ids.tolist() == [[2, 4, 5, 6, 3], [2, 7, 3, 0, 0], [2, 3, 0, 0, 0]]
        expected = outputs(DistilBertModel.from_pretrained(folder).eval(), ids, mask)
        torch.testing.assert_close(backbone(ids, mask)[mask], expected[mask], rtol=0, atol=1e-6)
        assert backbone.tokenize(["red " * 99])[0].shape == (1, 24)  # its table has no more positions

    def test_taken_from_the_hubs_cache(self, folder: Path, tmp_path: Path, offline: Path) -> None:
        repository = offline / "models--someone--small"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        assert distilbert("someone/small").fingerprint == distilbert(str(folder)).fingerprint

    @pytest.fixture
    def offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty cache of the hub on a machine without network."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return tmp_path / "hub"

    @pytest.mark.parametrize("path", ["someone/small", "/nowhere/at/all", "not_a_folder"])
    def test_neither_here_nor_fetched(self, path: str, offline: Path) -> None:
        with pytest.raises(UserError, match="give a local folder") as error:
            distilbert(path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
            (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
            (lambda folder: (folder / "config.json").unlink(), "is not DistilBERT's"),
            (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "is not DistilBERT's"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "is damaged or holds another network"),
            (lambda folder: resize(folder, 3), "is damaged or holds another network"),
        ],
    )
    def test_damage_is_one_line(self, folder: Path, damage: Callable[[Path], object], message: str) -> None:
        damage(folder)
        with pytest.raises(UserError, match=message) as error:
            FrozenBackbone(distilbert(str(folder))).encode(["a"])
        assert "\n" not in str(error.value)

    def test_a_pickle_is_never_opened(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"has no model\.safetensors"):
            distilbert(str(folder))


def resize(folder: Path, layers: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layers": layers}))
