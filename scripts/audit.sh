#!/bin/sh
# Known vulnerabilities of exactly what is installed: sh scripts/audit.sh [VENV]
# Decides: that pip-audit comes into a folder of its own, gone at the end, and that a package which the service does
# not know fails the audit: a mirror that serves no advisories would otherwise look like a clean bill.
# Leaves out: what to do about them. AUDIT_SERVICE: pypi (default) or osv.
set -eu

cd "$(dirname "$0")/.."
venv=${1:-.venv}
[ -x "$venv/bin/python" ] || { echo "audit: no $venv here; make install" >&2; exit 1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Local parts (torch 2.13.0+cpu) name builds, which no advisory knows.
"$venv/bin/python" -m pip freeze --exclude-editable > "$scratch/frozen"
sed -n 's/^\([A-Za-z0-9._-]*==[^+ ;]*\).*/\1/p' "$scratch/frozen" > "$scratch/requirements.txt"
echo "audit: $(wc -l < "$scratch/requirements.txt") packages of $venv"

"$venv/bin/python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip --disable-pip-version-check install --quiet pip-audit
"$scratch/venv/bin/python" -m pip_audit --requirement "$scratch/requirements.txt" --no-deps --disable-pip --strict \
    --vulnerability-service "${AUDIT_SERVICE:-pypi}" --progress-spinner off || {
    echo "audit: failed; see above (a package that was 'not found' was not audited: is the service reached?)" >&2
    exit 1
}
