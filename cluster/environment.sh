# Read by the login shell of every node, so also by `ray start` and by the script of `ray submit`. No secrets here.
export PATH="$HOME/.stillhouse/venv/bin:$PATH"
export RAY_AUTH_MODE=token
# Training frees and asks again for the same memory at each step: keep it (see orchestrator/allocator.py).
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=536870912
