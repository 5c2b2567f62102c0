# Read by the login shell of every node, so also by `ray start` and by the script of `ray submit`. No secrets here.
export PATH="$HOME/.stillhouse/venv/bin:$PATH"
export RAY_AUTH_MODE=token
