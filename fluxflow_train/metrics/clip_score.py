"""CLIPScore: how well a picture fits its caption, by a CLIP on this machine or from the hub.

B batch, H W pixels, S side of CLIP's input, L tokens. torchmetrics' own fails with transformers 5 (torchmetrics issue
3407), and its preprocessing depends on what else is installed: here it is a few lines.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.errors import UserError
from fluxflow_train.generation import pinned_precision
from fluxflow_train.metrics.extractor import PIECE, state_sha256
from fluxflow_train.models.text_backbones import CONFIG, TOKENIZER, WEIGHTS, from_hub

# Of OpenAI's CLIP, for pixels in [0, 1]; LAION's take the same.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
REMEDY = f"give a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER}, or a hub id where there is network"


class ClipScore(nn.Module):
    """`forward(image, captions)`: 100 max(cos(image, caption), 0) for each pair, in fp32 and outside autocast.

    Source: Hessel et al. 2021, "CLIPScore", with torchmetrics' factor of 100 in place of the paper's 2.5.

    Raises:
        UserError: no CLIP at `folder` (a folder, or the id of a hub model in safetensors: nothing is unpickled).
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        path = local(str(folder))
        self.name = str(folder)
        self.model = read(path).eval().requires_grad_(False)
        config: Any = self.model.config
        self.side: int = config.vision_config.image_size
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(path / TOKENIZER))
        self.tokenizer.enable_truncation(config.text_config.max_position_embeddings)
        self.tokenizer.enable_padding()  # after the end of a text, where causal attention never looks
        self.weights_sha256 = state_sha256(self.model.state_dict())
        self.eval()

    def train(self, mode: bool = True) -> "ClipScore":
        """Stays in eval mode: dropout would draw from the global generator."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, captions: Sequence[str]) -> Tensor:
        """uint8 (B, 3, H, W) and B captions (cut at CLIP's length, 77 tokens) to fp32 (B,) in [0, 100].

        Raises:
            ValueError: not uint8, or not one caption for each image.
        """
        if image.dtype != torch.uint8 or len(captions) != image.shape[0]:
            raise ValueError(
                f"expected uint8 images and a caption for each, got {image.dtype} {tuple(image.shape)} and"
                f" {len(captions)} captions"
            )
        if not captions:
            return torch.zeros(0, device=image.device)
        with pinned_precision(image.device):
            pieces = [self._cosine(piece, captions[i * PIECE :][:PIECE]) for i, piece in enumerate(image.split(PIECE))]
        return torch.cat(pieces).clamp_min(0).mul(100)

    def _cosine(self, image: Tensor, captions: Sequence[str]) -> Tensor:
        encodings = self.tokenizer.encode_batch(list(captions))
        output = self.model(
            input_ids=torch.tensor([e.ids for e in encodings], device=image.device),
            attention_mask=torch.tensor([e.attention_mask for e in encodings], device=image.device),
            pixel_values=preprocessed(image, self.side),
        )
        return F.cosine_similarity(output.image_embeds, output.text_embeds)


def preprocessed(image: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) to fp32 (B, 3, S, S) as CLIP was trained: the short side to S, the centre, normalised."""
    height, width = image.shape[-2:]
    short = min(height, width)
    size = (height * side // short, width * side // short)
    x = F.interpolate(image.float(), size, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x[..., top : top + side, left : left + side] / 255 - mean) / std


def local(folder: str) -> Path:
    """The folder itself, or the hub's copy of the model of that id. Raises UserError where it is no CLIP."""
    try:
        path = Path(folder) if Path(folder).is_dir() else from_hub(folder)
    except UserError as error:
        raise UserError(f"{folder} is neither a folder nor a CLIP that the hub gives: {REMEDY}") from error
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (path / name).is_file()]
    if missing:
        raise UserError(f"the CLIP in {folder} lacks {', '.join(missing)}: {REMEDY}")
    return path


def read(path: Path) -> nn.Module:
    """transformers' CLIPModel in fp32, every weight from the file. Raises UserError where it is damaged or no CLIP."""
    from transformers import CLIPModel

    try:
        if json.loads((path / CONFIG).read_text())["model_type"] != "clip":
            raise UserError(f"the model in {path} is no CLIP: {REMEDY}")
        loaded: Any = CLIPModel.from_pretrained(
            path, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"the CLIP in {path} is damaged ({type(error).__name__}): fetch it again") from error
    model, found = loaded
    if found["missing_keys"]:
        raise UserError(f"the CLIP in {path} lacks {len(found['missing_keys'])} of its weights: fetch it again")
    return model
