#!/bin/sh
# A picture's name with nothing but curl, ImageMagick and the shell.
#
#   sh curl.sh cat.jpg                        the agent on this machine
#   sh curl.sh cat.jpg camera-3:8000 animals  another address and endpoint
#   sh curl.sh raw.bin localhost:8000 digits  a file of exactly the tensor's bytes goes as it is
#
# What the other examples do for you is done by hand here: resizing to the model's size (it is
# stretched) and asking for the best class by the protocol's classification extension.
set -eu
picture=${1:?usage: sh curl.sh PICTURE [HOST:PORT] [ENDPOINT]}
server=${2:-localhost:8000}
model=${3:-}

fail() { echo "$1" >&2; exit 1; }
# The first value of a key in a JSON text: enough for the few that are needed.
value() { tr -d ' \n' | sed -n "s/.*\"$1\":\"\{0,1\}\([^\",}]*\).*/\1/p"; }

[ -r "$picture" ] || fail "There is no file $picture."
if [ -z "$model" ]; then
    models=$(curl -fsS -X POST "http://$server/v2/repository/index") || fail "No agent answers at $server."
    model=$(echo "$models" | value name)
fi
about=$(curl -fsS "http://$server/v2/models/$model") || fail "There is no model $model at $server."

# Of the input: its name and [batch, height, width, channels].
input=$(echo "$about" | tr -d ' \n' | sed 's/.*"inputs":\[{\([^}]*\)}.*/\1/')
name=$(echo "$input" | sed 's/.*"name":"\([^"]*\)".*/\1/')
shape=$(echo "$input" | sed 's/.*"shape":\[\([^]]*\)\].*/\1/')
height=$(echo "$shape" | cut -d, -f2)
width=$(echo "$shape" | cut -d, -f3)
channels=$(echo "$shape" | cut -d, -f4)
output=$(echo "$about" | tr -d ' \n' | sed 's/.*"outputs":\[{[^}]*"name":"\([^"]*\)".*/\1/')
bytes=$((height * width * channels))

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ "$(wc -c <"$picture")" -eq "$bytes" ]; then
    cp "$picture" "$work/tensor"
elif command -v convert >/dev/null; then
    [ "$channels" -eq 1 ] && kind=gray || kind=rgb
    convert "$picture" -auto-orient -resize "${width}x${height}!" -depth 8 "$kind:$work/tensor"
else
    fail "Install ImageMagick, or give a file of exactly $bytes bytes."
fi

# The binary tensor extension: a JSON header, then the bytes; the header's length goes beside it.
printf '{"inputs":[{"name":"%s","datatype":"UINT8","shape":[1,%d,%d,%d],"parameters":{"binary_data_size":%d}}],"outputs":[{"name":"%s","parameters":{"classification":1,"binary_data":false}}]}' \
    "$name" "$height" "$width" "$channels" "$bytes" "$output" >"$work/header"
cat "$work/header" "$work/tensor" >"$work/body"
answer=$(curl -sS "http://$server/v2/models/$model/infer" \
    -H "Content-Type: application/octet-stream" \
    -H "Inference-Header-Content-Length: $(wc -c <"$work/header" | tr -d ' ')" \
    --data-binary "@$work/body")

# "score:index:label" -> the label
best=$(echo "$answer" | sed -n 's/.*"data": *\["\([^"]*\)".*/\1/p')
[ -n "$best" ] || fail "$answer"
echo "$best" | cut -d: -f3-
