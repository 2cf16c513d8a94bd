"""Fine-tune a small transformer with LoRA, and average the adapters: TWA beside fixed averages.

A byte-level language model (tied embeddings, activation checkpointing) is trained on Python's own
sources, and then fine-tuned on its documentation through adapters (peft), everything else frozen.
Candidates are as small as the adapters. Needs ``pip install ".[lora]"``; about two minutes.

    python examples/lora.py             # 2 seeds
    python examples/lora.py --seeds 5
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import random
import statistics
import sysconfig
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_twa import SolverConfig, TWACallback, average

CONTEXT, WIDTH, HEADS, LAYERS = 128, 96, 4, 3


# --- data: bytes


def windows(text: str) -> TensorDataset:
    """Whole windows of a context and the byte after each of its bytes."""
    data = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()
    count = (len(data) - 1) // CONTEXT
    inputs, targets = data[: count * CONTEXT], data[1 : count * CONTEXT + 1]
    return TensorDataset(inputs.view(count, CONTEXT), targets.view(count, CONTEXT))


def code(size: int) -> TensorDataset:
    """Sources of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    return windows("".join(file.read_text("utf-8") for file in files)[:size])


def prose(train: int, held_out: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training, validation and test windows of the documentation, of different topics."""
    names = sorted(topics)
    random.Random(0).shuffle(names)
    data = windows("".join(topics[name] for name in names))
    x, y = data.tensors
    ends = [0, train, train + held_out, train + 2 * held_out]
    assert ends[-1] <= len(x), f"there are {len(x)} windows"
    first, second, third = (TensorDataset(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends))
    return first, second, third


# --- model


class Block(nn.Module):
    """Causal attention and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(*qkv.chunk(3, dim=1), is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Logits of the next bytes, ``(batch, context, 256)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.embed.weight  # tied

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position.weight
        for layer in self.layers:  # activations are computed again in the backward pass
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(self.norm(x))


class Learner(L.LightningModule):
    """A network trained with AdamW on what requires gradients.

    Args:
        net: Gives logits.
        lr: Learning rate.
        fall: First epoch and number of epochs in which it falls to zero; ``None`` keeps it.
    """

    def __init__(self, net: nn.Module, lr: float, fall: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.net, self.lr, self.fall = net, lr, fall

    def bits(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy in bits a byte."""
        x, y = batch
        return F.cross_entropy(self.net(x).flatten(0, 1), y.flatten()) / math.log(2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.fall is not None and isinstance(self.optimizers().optimizer, torch.optim.AdamW):
            start, epochs = self.fall
            done = self.trainer.current_epoch + batch_idx / self.trainer.num_training_batches
            factor = min(1.0, max(0.0, 1 - (done - start) / epochs))
            self.optimizers().param_groups[0]["lr"] = self.lr * factor
        return self.bits(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_bits", self.bits(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_bits", self.bits(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, self.lr, weight_decay=0.01)


def trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# --- comparison


class Comparison:
    """One pretrained network, and its fine-tuning from several seeds.

    Args:
        args: The command line.
        folder: Where checkpoints are written.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        L.seed_everything(0, verbose=False)
        self.train, self.val, self.test = prose(args.windows, args.windows // 4)
        net = Transformer()
        sources = DataLoader(code(args.pretrain_bytes), batch_size=16, shuffle=True)
        trainer(1).fit(Learner(net, 3e-3, fall=(0, 1)), sources)
        self.pretrained = net.state_dict()
        self.rows: dict[tuple[str, int], list[float]] = {}
        self.notes: list[str] = []

    def learner(self, fall: tuple[int, int] | None = None) -> Learner:
        """The pretrained network with new adapters; only they are trainable."""
        net = Transformer()
        net.load_state_dict(self.pretrained)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "project", "up", "down"])
        return Learner(get_peft_model(net, config), 1e-2, fall)

    def fit(self, learner: Learner, epochs: int, seed: int, *callbacks: Any, **kwargs: Any) -> None:
        """Fine-tune; the order of the batches depends on the seed."""
        L.seed_everything(seed, verbose=False)
        train = DataLoader(self.train, batch_size=16, shuffle=True)
        val = DataLoader(self.val, batch_size=16)
        trainer(epochs, *callbacks).fit(learner, train, val, **kwargs)

    def score(self, row: str, epochs: int, learner: Learner) -> None:
        """Test bits a byte of one seed."""
        result = trainer(1).test(learner, DataLoader(self.test, batch_size=64), verbose=False)
        self.rows.setdefault((row, epochs), []).append(result[0]["test_bits"])

    def run(self, seed: int) -> None:
        """One seed: collect with a constant learning rate, and end the run in several ways."""
        start, end = self.args.collect_epochs, self.args.collect_epochs + self.args.twa_epochs
        L.seed_everything(seed, verbose=False)
        learner = self.learner()
        self.score("pretrained", 0, learner)

        # Training up to the phase, once, for all rows
        twa = TWACallback(start_epoch=start)
        saver = ModelCheckpoint(self.folder / str(seed), "{epoch}", save_top_k=-1)
        self.fit(learner, end, seed, twa, saver)
        ready = self.folder / str(seed) / f"epoch={start - 1}.ckpt"
        kept = torch.load(ready, weights_only=True)

        other = self.learner()
        other.load_state_dict(kept["state_dict"])
        self.score("constant learning rate", start, other)
        other.load_state_dict(average(twa))
        self.score("uniform average of the candidates", start, other)
        self.score("TWA-t", end, learner)

        other = self.learner(fall=(start, end - start))
        self.fit(other, end, seed + 1000, ckpt_path=ready)
        self.score("learning rate falls to 0", end, other)

        uniform = TWACallback(start, solver=SolverConfig(name="uniform"))
        self.fit(other := self.learner(), end, seed + 1000, uniform, ckpt_path=ready)
        self.score("uniform average, trained on", end, other)

        self.fit(
            other := self.learner(), end, seed + 1000, TWACallback(start, "val"), ckpt_path=ready
        )
        self.score("TWA-v", end, other)
        self.check(learner, twa, ready)

    def check(self, learner: Learner, twa: TWACallback, ready: Path) -> None:
        """What is frozen is as it was, and the adapters are the average that is said."""
        beta = twa.averaging_weights[:, 0]
        trained = 0
        for name, parameter in learner.named_parameters():
            held = [c.parameters[name] for c in twa.candidates]
            if parameter.requires_grad:
                trained += parameter.numel()
                mix = sum(b * h.double() for b, h in zip(beta, held, strict=True))
                torch.testing.assert_close(parameter.double(), mix, rtol=1e-4, atol=1e-5)
            else:
                original = name.removeprefix("net.base_model.model.").replace(".base_layer", "")
                assert torch.equal(parameter, self.pretrained[original]), name
        total = sum(p.numel() for p in learner.parameters())
        plain = self.folder / "plain.ckpt"
        state = torch.load(ready, weights_only=True)
        del state["callbacks"]
        torch.save(state, plain)
        self.notes = [
            f"{trained:,} of {total:,} parameters are trained. A checkpoint with "
            f"{twa.num_candidates} candidates takes {ready.stat().st_size / 2**20:.2f} MiB, "
            f"without them {plain.stat().st_size / 2**20:.2f}."
        ]

    def table(self) -> str:
        """Every row, mean and standard deviation over the seeds, and its difference to TWA-t."""
        lines = [
            "| adapters | epochs | test bits a byte | TWA-t is better by |",
            "|---|---:|---:|---:|",
        ]
        (ours,) = [values for (name, _), values in self.rows.items() if name == "TWA-t"]
        for (name, epochs), values in sorted(self.rows.items(), key=lambda item: item[0][1]):
            gains = [a - b for a, b in zip(values, ours, strict=True)]
            gain = "" if values is ours else plus_minus(gains, math.sqrt(len(gains)), sign="+")
            lines.append(f"| {name} | {epochs} | {plus_minus(values, 1.0)} | {gain} |")
        return "\n".join(lines)


def plus_minus(values: list[float], divisor: float, sign: str = "") -> str:
    """Mean, and standard deviation over a divisor where there are several."""
    spread = f" ± {statistics.stdev(values) / divisor:.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="number of fine-tuning runs")
    parser.add_argument("--collect-epochs", type=int, default=12, help="epochs before the phase")
    parser.add_argument("--twa-epochs", type=int, default=3, help="epochs of the phase")
    parser.add_argument("--windows", type=int, default=640, help="training windows of 128 bytes")
    parser.add_argument("--pretrain-bytes", type=int, default=1_000_000)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", "TWACallback.data='val'. trains")
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be")
    warnings.filterwarnings("ignore", "The number of training batches")
    warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(args, Path(folder))
        for seed in range(args.seeds):
            comparison.run(seed)
    print(comparison.table())
    print()
    print("\n".join(comparison.notes))
    print(f"{args.seeds} seeds; ± standard deviation, of differences standard error (paired).")


if __name__ == "__main__":
    main()
