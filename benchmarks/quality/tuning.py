"""Training and asking the small LLaVA on rows whose pictures all stand at the same place.

Padding stands right of everything and attention is causal, so no mask is needed. The parts are put together
here for speed; `check_assembly` compares them with the whole model.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.quality.pools import Questions
from benchmarks.quality.target import make_processor

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
_STD = (0.26862954, 0.26130258, 0.27577711)
_IGNORED = -100
_WARMUP_SHARE, _MOST_WARMUP = 0.1, 200
_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Rows as tensors on the device.

    Attributes:
        ids: (n, t) int64, the text after the picture, padded on the right.
        labels: (n, t) int64, -100 where nothing is to be predicted.
        picture: (n,) int64.
        pictures: (m, side, side, 3) uint8.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    picture: torch.Tensor
    pictures: torch.Tensor


@dataclass(frozen=True, slots=True)
class Training:
    """What a training took: seconds, steps, and the last loss."""

    seconds: float = 0.0
    steps: int = 0
    loss: float = float("nan")


class Trainee:
    """A model that is trained and asked."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, *, autocast: bool) -> None:
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, device
        self._autocast = autocast
        prefix = tokenizer("<s>USER: ", add_special_tokens=False)["input_ids"]
        self._prefix = torch.tensor(prefix, device=device)
        self._mean, self._std = (torch.tensor(values, device=device) for values in (_MEAN, _STD))

    def encoded(self, rows: Questions) -> Encoded:
        """Rows with the text that the chat template gives, from the line break after the picture on."""
        questions = [f"\n{asked} ASSISTANT: " for asked in rows.asked]
        texts = [f"{asked}{answer}</s>" for asked, answer in zip(questions, rows.answers, strict=True)]
        batch = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        longest = math.ceil(max(map(len, batch["input_ids"])) / 8) * 8
        ids = np.full((len(texts), longest), self.tokenizer.pad_token_id, np.int64)
        labels = np.full((len(texts), longest), _IGNORED, np.int64)
        for row, (tokens, offsets) in enumerate(
            zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ):
            ids[row, : len(tokens)] = tokens
            answered = [end > len(questions[row]) for _, end in offsets]
            labels[row, : len(tokens)] = np.where(answered, tokens, _IGNORED)
        return Encoded(
            *(torch.from_numpy(one).to(self.device) for one in (ids, labels)),
            torch.from_numpy(rows.picture).to(self.device),
            torch.from_numpy(np.array(rows.pictures)).to(self.device),
        )

    def train(
        self, data: Encoded, rows: NDArray[np.int64], *, epochs: float, batch: int, rate: float, seed: int
    ) -> Training:
        """AdamW with a warm-up and a cosine to nothing."""
        generator = torch.Generator().manual_seed(seed)
        steps = max(1, math.ceil(epochs * len(rows) / batch))
        optimizer = self._optimizer(rate)
        warm = max(1, min(int(steps * _WARMUP_SHARE), _MOST_WARMUP))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))),
        )
        rounds = math.ceil(steps * batch / len(rows))
        chosen = torch.from_numpy(rows)
        order = torch.cat([chosen[torch.randperm(len(rows), generator=generator)] for _ in range(rounds)])
        order = order.to(self.device)
        self.model.train()
        start = time.perf_counter()
        loss = torch.zeros(())
        for step in range(steps):
            logits, labels = self._logits(data, order[step * batch : (step + 1) * batch])
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        last = float(loss.detach())  # waits for the device
        return Training(time.perf_counter() - start, steps, last)

    @torch.no_grad()
    def right(self, data: Encoded, at_once: int = 512) -> NDArray[np.bool_]:
        """(n,) bool: whether greedy decoding gives the whole answer, its end included."""
        self.model.eval()
        found = []
        for rows in torch.arange(len(data.ids), device=self.device).split(at_once):
            logits, labels = self._logits(data, rows)
            found.append(((logits.argmax(-1) == labels) | (labels == _IGNORED)).all(1))
        right: NDArray[np.bool_] = torch.cat(found).cpu().numpy()
        return right

    def hidden(self, pictures: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The last states, of each position that predicts a token of the text."""
        inner = self.model.model
        pixels = ((pictures.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2)
        vision = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        embed = inner.get_input_embeddings()
        parts = (
            embed(self._prefix).expand(len(ids), -1, -1),
            inner.multi_modal_projector(vision).float(),
            embed(ids),
        )
        states = inner.language_model(inputs_embeds=torch.cat(parts, 1), use_cache=False).last_hidden_state
        predicting: torch.Tensor = states[:, -ids.shape[1] - 1 : -1]
        return predicting

    def _logits(self, data: Encoded, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = data.ids[rows], data.labels[rows]
        if self.device.type == "cpu":  # a GPU would have to wait for the length
            longest = int((ids != self.tokenizer.pad_token_id).sum(1).max())
            ids, labels = ids[:, :longest], labels[:, :longest]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.model.lm_head(self.hidden(data.pictures[data.picture[rows]], ids)), labels

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        matrices = [one for one in self.model.parameters() if one.ndim > 1]
        others = [one for one in self.model.parameters() if one.ndim <= 1]
        groups: Sequence[dict[str, Any]] = (
            {"params": matrices, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        )
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(list(groups), lr=rate, betas=(0.9, 0.98), fused=fused)


@torch.no_grad()
def check_assembly(trainee: Trainee, rows: Questions, side: int) -> float:
    """How far the parts put together are from the whole model, as a share of the largest logit.

    Raises:
        SystemExit: They differ by more than rounding.
    """
    picture = rows.pictures[rows.picture[0]]
    parts: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": rows.asked[0]}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": rows.answers[0]}]},
    ]
    processor = make_processor(trainee.tokenizer, side)
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], images=[[Image.fromarray(picture)]], return_tensors="pt")
    inputs = inputs.to(trainee.device)
    inputs.pop("token_type_ids", None)
    encoded = trainee.encoded(rows.take(np.arange(1)))
    n = int((encoded.ids[0] != trainee.tokenizer.pad_token_id).sum())
    if inputs["input_ids"][0, -n:].tolist() != encoded.ids[0, :n].tolist():
        raise SystemExit("the text of a row differs from what the chat template gives")
    trainee.model.eval()
    whole = trainee.model(**inputs).logits[0, -n - 1 : -1].float()
    ours = trainee.model.lm_head(trainee.hidden(encoded.pictures[encoded.picture], encoded.ids[:, :n]))[0]
    error = float((whole - ours.float()).abs().max() / whole.abs().max())
    if error > _TOLERANCE:
        raise SystemExit(f"the parts of the model give other logits than the whole: off by {error:.1e}")
    return error
