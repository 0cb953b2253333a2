"""Shared settings of the kernel tests."""

from hypothesis import HealthCheck, settings

# The first example of a kernel compiles it, which takes seconds.
settings.register_profile(
    "kernels", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kernels")
