#!/usr/bin/env bash
# Environment, linter, tests. Other arguments go to pytest.
#
#   ./run_tests.sh              what every change should pass: three minutes on two cores
#   ./run_tests.sh --all        the slow tests too: ten minutes
#   ./run_tests.sh -k orth      the tests with "orth" in their names, without the slow ones
#
# Tests marked gpu are left out by both: ./run_tests.sh -m gpu runs them on a machine with CUDA.
set -euo pipefail
cd "$(dirname "$0")"
. common/setup_env.sh
# dev first: pip would complain of the demo packages, which come without what they ask for
setup_env requirements.txt tests/requirements.txt \
    encoders/demo_requirements.txt

markers="not slow and not gpu"
if [[ ${1-} == --all ]]; then
    markers="not gpu"
    shift
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
# whole files go to the two processes, so that a file's fixtures are made once; of two -m the last
# counts
exec "$python" -m pytest -n 2 --dist loadfile -m "$markers" "$@"
