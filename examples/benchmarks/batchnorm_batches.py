"""How many batches BatchNorm statistics of an average need: the loss by the number of batches.

Trains a small convolutional network on scikit-learn's digits, averages its weights of the second
half of the epochs, computes the statistics over the first batches of several random orders, and
prints the mean loss and accuracy on held-out images, with the largest difference in loss from the
statistics of a whole epoch.

    python examples/benchmarks/batchnorm_batches.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_twa import average
from lightning_twa.phases.batchnorm import reestimate, tracked_batch_norms


def network() -> nn.Sequential:
    """Four convolutions with BatchNorm for 1x8x8 images."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def orders(n: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Indices of the batches of one epoch; the last one may be smaller by half at most."""
    parts = torch.randperm(n, generator=generator).split(size)
    return parts if len(parts[-1]) > size // 2 else parts[:-1]


def train(x: Tensor, y: Tensor, size: int, epochs: int, seed: int) -> nn.Sequential:
    """A network with the uniform average of the weights at the ends of the later epochs."""
    torch.manual_seed(seed)
    model, generator = network(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    kept = []
    for epoch in range(epochs):
        for batch in orders(len(x), size, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        if epoch >= epochs // 2:
            kept.append({name: value.clone() for name, value in model.state_dict().items()})
    model.load_state_dict(average(kept))
    return model


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy in percent."""
    model.eval()
    output = model(x)
    model.train()
    loss = float(nn.functional.cross_entropy(output, y))
    return loss, 100 * float((output.argmax(1) == y).double().mean())


def main() -> None:
    """One row for each batch size and number of batches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", type=int, default=5)
    args = parser.parse_args()
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    mix = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fit, held = mix[:1200], mix[1200:]
    print(f"torch {torch.__version__}, {args.seeds} seeds, {args.orders} orders each")
    print("| batch size | batches | loss | accuracy (%) | largest difference in loss |")
    print("|---|---|---|---|---|")
    for size in args.batch_sizes:
        found: dict[int | None, list[tuple[float, float, float]]] = {}
        for seed in range(args.seeds):
            model = train(images[fit], labels[fit], size, args.epochs, seed)
            layers = tracked_batch_norms(model, set(model.modules()))
            for order in range(args.orders):
                batches = orders(len(fit), size, torch.Generator().manual_seed(100 + order))
                whole = 0.0
                for n in (None, *(n for n in args.batches if n < len(batches))):

                    def forward(step, model=model, batches=batches, n=n):  # type: ignore[no-untyped-def]
                        with torch.no_grad():
                            for batch in batches[:n]:
                                with step():
                                    model(images[fit[batch]])
                        return len(batches[:n])

                    reestimate(layers, forward)
                    loss, accuracy = score(model, images[held], labels[held])
                    whole = loss if n is None else whole
                    found.setdefault(n, []).append((loss, accuracy, abs(loss - whole)))
        for n, rows in sorted(found.items(), key=lambda item: item[0] or 10**9):
            losses, accuracies, differences = zip(*rows, strict=True)
            print(
                f"| {size} | {n or 'an epoch'} | {statistics.mean(losses):.4f} "
                f"| {statistics.mean(accuracies):.2f} | {max(differences):.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
