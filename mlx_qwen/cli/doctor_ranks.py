"""`mlx-qwen doctor --distributed`: the connection between Macs, and what it bounds."""

import os

import click

from mlx_qwen.distributed.environment import own_rank

_SIZES = ("27B", "35B-A3B", "122B-A10B", "397B-A17B")


def show_ranks() -> None:
    """Print what rank 0 finds, while all ranks measure; the others print nothing."""
    rank = own_rank()
    if rank is None:
        raise click.UsageError(
            "--distributed needs several ranks: mlx.launch --hostfile hosts.json -- mlx-qwen doctor --distributed"
        )

    from mlx_qwen.checkpoint.released import released
    from mlx_qwen.distributed.ending import end
    from mlx_qwen.distributed.environment import joined, within
    from mlx_qwen.distributed.probe import network_of, sums
    from mlx_qwen.model.network import traffic

    group = joined()
    with within(60.0, lambda: end("The ranks are connected, but no sum over them came back within 60 s.")):
        measured = sums(group)
    if rank:
        return
    click.echo(f"{'ranks':<28}{group.size()}\n{'backend':<28}{_backend()}")
    if os.environ.get("MLX_METAL_FAST_SYNCH", "0") != "0":
        click.echo("MLX_METAL_FAST_SYNCH is set: sums are quicker, and may lock the GPU until the Mac is started anew.")
    for one in measured:
        click.echo(f"{f'all_sum of {one.nbytes:,} B':<28}{1e3 * one.seconds:.3f} ms")
    network = network_of(measured, group.size())
    click.echo(f"{'bandwidth':<28}{network.bandwidth / 1e9:.2f} GB/s\n")
    click.echo("What the network alone bounds, whatever the Macs compute:")
    for size in _SIZES:
        sent = traffic(released(size).text)
        seconds = sent.seconds(network, group.size())
        click.echo(f"{size:<28}{sent.sums} sums a token: {1e3 * seconds:.2f} ms, at most {1 / seconds:,.0f} tokens/s")
    click.echo(
        f"\nmlx-qwen plan --ranks {group.size()} --latency {1e3 * network.latency:.3g} "
        f"--link {network.bandwidth / 1e9:.3g} ... counts it in."
    )


def _backend() -> str:
    """What the launcher set up."""
    if os.environ.get("MLX_JACCL_COORDINATOR"):
        return "jaccl (RDMA)"
    return "ring (TCP)" if os.environ.get("MLX_HOSTFILE") else "mpi or nccl"
