"""The library's flow against FrEIA's AllInOneBlock flow of the same weights, position code concatenated.

Run it as ``python benchmarks/flow.py``; it prints JSON lines. Latents, log-determinants and gradients are
compared before a ratio is printed: in float32 on the batch, in float64 on one image. The share of the
machine's matrix-product rate counts only the products that the function needs, however it is arranged.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from harness import (
    add_arguments,
    add_device,
    apply_arguments,
    emit,
    environment,
    interleave,
    peak_memory,
    speedup,
)
from peer import PublishedFlow
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hgadlib.flow import FeatureFlow
from hgadlib.runs.hardware import matmul_rate

NAME = "flow"
# (C, side of the grid): Lite0's stages 2 to 4 at 256 pixels, and the same channels on other grids.
CASES = ((40, 32), (40, 16), (112, 32), (112, 16), (320, 8))
# The published subnets, and those of params/experiments/tables.yaml, once the library's default.
SETTINGS = {
    "published": {"layers": 12, "position_dim": 256, "ratio": 2},
    "default": {"layers": 8, "position_dim": 64, "ratio": 1},
}
# Outputs and gradients. A hidden unit within rounding of its ReLU's kink makes single-precision gradients
# jump, so the strict comparison of gradients is the one in double precision.
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-11, 1e-11)}


def make_flow(channels: int, side: int, setting: str) -> FeatureFlow:
    """Make a flow whose every parameter is off its initial value, so that all of them matter."""
    torch.manual_seed(0)
    chosen = SETTINGS[setting]
    position_dim = chosen["position_dim"]
    hidden = chosen["ratio"] * (channels - channels // 2 + position_dim)
    flow = FeatureFlow(
        channels, (side, side), layers=chosen["layers"], position_dim=position_dim, hidden=hidden
    )
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return flow


def nll(z: Tensor, log_det: Tensor) -> Tensor:
    """Mean negative log-likelihood under a standard Gaussian, up to its constant."""
    return (0.5 * z.square().sum(-1) - log_det).mean()


def tasks(flow: FeatureFlow, maps: Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    """Give both flows' tasks: a training step's forward and backward pass, and inference."""
    peer = PublishedFlow(flow)
    rows = maps.permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    def both(module: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
        def train() -> None:
            module.zero_grad(set_to_none=True)
            nll(*module(x)).backward()

        def infer() -> None:
            with torch.no_grad():  # PyTorch's counter of FLOPs does not take inference mode
                module(x)

        return {"forward+backward": train, "inference": infer}

    return {"ours": both(flow, rows), "all_in_one_block": both(peer, maps)}


def compare(flow: FeatureFlow, maps: Tensor) -> dict[str, float]:
    """Give the largest difference of outputs over their largest value, and that of all gradients in the norm.

    Raises:
        SystemExit: It is more than rounding.
    """
    peer = PublishedFlow(flow)
    z, log_det = flow(maps.permute(0, 2, 3, 1).flatten(1, 2))
    expected = peer(maps)
    nll(z, log_det).backward()
    nll(*expected).backward()
    with torch.no_grad():
        inferred = flow(maps.permute(0, 2, 3, 1).flatten(1, 2))
    ours, expected_grads = (
        torch.cat([p.grad.flatten() for _, p in sorted(module.named_parameters()) if p.grad is not None])
        for module in (flow.inn, peer.inn)
    )
    found = {
        "z": max(relative(part[0].flatten(0, 1), expected[0]) for part in ((z, log_det), inferred)),
        "log_det": max(relative(part[1].flatten(), expected[1]) for part in ((z, log_det), inferred)),
        # In the norm: where a hidden unit lies within rounding of its ReLU's kink, one gradient jumps.
        "gradients": float((ours - expected_grads).norm() / expected_grads.norm()),
    }
    flow.zero_grad(set_to_none=True)
    outputs, gradients = TOLERANCE[maps.dtype]
    if not (max(found["z"], found["log_det"]) <= outputs and found["gradients"] <= gradients):
        raise SystemExit(
            f"expected AllInOneBlock's outputs to {outputs}, gradients to {gradients}, found {found}"
        )
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float(((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)).detach())


def needed_flops(flow: FeatureFlow, images: int) -> dict[str, int]:
    """Count the FLOPs of the matrix products that the flow cannot do without, by task.

    Per position and block: both layers of the subnet and the rotation forwards; backwards twice the layers
    and once the rotation, which takes no gradient. The code's share of the first layer is counted once
    per row and per column of the grid. The first block's input takes no gradient.
    """
    height, width = flow.grid
    positions = images * height * width
    block = flow.inn[0]
    passive, active = block.splits
    channels, hidden = passive + active, block.subnet[0].out_features
    both_layers = 2 * hidden * (passive + 2 * active)
    rotation = 2 * channels**2
    share = 2 * (height + width) * (flow.positions.shape[1] // 2) * hidden
    n = len(flow.inn)
    forward = n * (positions * (both_layers + rotation) + share)
    first = positions * (2 * hidden * passive + rotation)
    backward = n * (positions * (2 * both_layers + rotation) + share) - first
    return {"inference": forward, "forward+backward": forward + backward}


def counted_flops(task: Callable[[], object]) -> int:
    """Count the FLOPs of a task's matrix products as PyTorch sees them."""
    with FlopCounterMode(display=False) as counter:
        task()
    return counter.get_total_flops()


def prepare(
    name: str, kind: str, channels: int, side: int, batch: int, setting: str, device: str
) -> Callable[[], object]:
    """Make the task of a memory measurement."""
    flow = make_flow(channels, side, setting).to(device)
    small = FeatureFlow(4, (2, 2), layers=1, position_dim=4).to(device)
    tasks(small, torch.randn(1, 4, 2, 2).to(device))[name][kind]()
    return tasks(flow, torch.randn(batch, channels, side, side).to(device))[name][kind]


def main() -> None:
    """Compare, then time, then measure memory, case by case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=[f"{c}x{s}" for c, s in CASES], help="CHANNELSxSIDE")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed")
    add_arguments(parser)
    add_device(parser)
    args = parser.parse_args()
    apply_arguments(args)
    emit(NAME, "environment", **environment(args.device, args.clock), batch=args.batch, repeats=args.repeats)
    for setting in args.settings:
        for case in args.cases:
            channels, side = (int(part) for part in case.split("x"))
            measure(channels, side, setting, args)


def measure(channels: int, side: int, setting: str, args: argparse.Namespace) -> None:
    """Measure one case."""
    batch, clock, device = args.batch, args.clock, args.device
    label = {"channels": channels, "grid": [side, side], "setting": setting}
    flow = make_flow(channels, side, setting).to(device)
    maps = torch.randn(batch, channels, side, side).to(device)
    emit(NAME, "differences", **label, dtype="float32", **compare(flow, maps))
    exact = compare(make_flow(channels, side, setting).to(device).double(), maps[:1].double())
    emit(NAME, "differences", **label, dtype="float64", **exact)
    pairs = tasks(flow, maps)
    needed = needed_flops(flow, batch)
    for kind in ("forward+backward", "inference"):
        # Beside the timing: a shared machine's rate changes.
        other = time.process_time if clock == "cpu" else None
        rate = matmul_rate(torch.device(device), size=2048, clock=other)
        chosen = {name: both[kind] for name, both in pairs.items()}
        times = interleave(chosen, repeats=args.repeats, device=device, clock=clock)
        for name, timing in times.items():
            emit(NAME, "seconds", **label, task=kind, flow=name, **timing.summary())
        ratio = speedup(times["ours"], times["all_in_one_block"])
        emit(NAME, "speedup", **label, task=kind, over="all_in_one_block", **ratio)
        peer_flops = counted_flops(pairs["all_in_one_block"][kind])
        emit(
            NAME,
            "matrix_products",
            **label,
            task=kind,
            needed_gflop=needed[kind] / 1e9,
            peer_gflop=peer_flops / 1e9,
            matmul_gflop_per_s=rate / 1e9,
            share_of_matmul_rate=needed[kind] / times["ours"].median / rate,
            speedup_at_matmul_rate=times["all_in_one_block"].median * rate / needed[kind],
        )
        memory = {
            name: peak_memory(prepare, name, kind, channels, side, batch, setting, device)
            for name in pairs
            if not args.no_memory
        }
        for name, peak in memory.items():
            emit(NAME, "memory", **label, task=kind, flow=name, **peak.summary())


if __name__ == "__main__":
    main()
