#!/usr/bin/env bash
# Environment, linter, tests. Arguments go to pytest: ./run_tests.sh -k orth
set -euo pipefail
cd "$(dirname "$0")"
. common/setup_env.sh
# dev first: pip would complain of the demo packages, which come without what they ask for
setup_env requirements.txt tests/requirements.txt experiments/requirements.txt \
    encoders/demo_requirements.txt

"$python" -m ruff check .
"$python" -m ruff format --check .
# two files at a time: three minutes on two cores instead of five
exec "$python" -m pytest -n 2 --dist loadfile "$@"
