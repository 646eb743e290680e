"""Uncertainty-aware alignment: the helper library underneath the notebooks of the study."""

import logging

# On import it tells everyone of a faster kernel for 4-bit weights on a CPU, which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
