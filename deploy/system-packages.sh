#!/bin/sh
# Installs the Debian packages that tests need and that are missing: where root and Debian
# through apt-get, elsewhere it lists them and goes on (only the tests that need them fail).
set -eu

missing=""
command -v chromium >/dev/null 2>&1 || missing="$missing chromium"      # browser tests
command -v promtool >/dev/null 2>&1 || missing="$missing prometheus"    # promtool check metrics

[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing Debian packages:$missing"
    export DEBIAN_FRONTEND=noninteractive
    # --no-install-recommends keeps out the node exporter; policy keeps the server from starting.
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null && exit 0
    echo "apt-get could not install:$missing (the tests that need them will fail)" >&2
else
    echo "Please install these packages, the tests that need them will fail:$missing" >&2
fi
exit 0
