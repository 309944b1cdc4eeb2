"""Coding agents that talk to a server on this machine: what each needs, the server, and their run."""

from mlx_qwen.launch.clients import CLIENTS, Client, Needs, Served, needs_of
from mlx_qwen.launch.running import run_client
from mlx_qwen.launch.serving import serving

__all__ = ["CLIENTS", "Client", "Needs", "Served", "needs_of", "run_client", "serving"]
