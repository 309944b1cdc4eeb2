"""One engine on several Macs: rank 0 takes requests, all take the same steps, and none waits for one that has gone.

MLX's own engine (`mx.distributed`, started by `mlx.launch`) carries what the ranks compute together. Beside it lies a
connection of each rank to rank 0, on which requests and turns go out and signs of life come back: a reduction never
returns when another rank has died, so that nobody learns it there.
"""
