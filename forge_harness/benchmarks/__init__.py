"""Measuring speed: paired, interleaved, as ratios over probes and peers timed in the same run."""
