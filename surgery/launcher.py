"""What a launcher (torchrun, accelerate launch) says of the processes that it starts, in their environment."""

import os


def started() -> int:
    """How many processes there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
