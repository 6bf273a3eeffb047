"""What a camera sees, picture by picture, with OpenCV (V4L2 on Linux).

    pip install 'shoal[client]' opencv-python-headless
    python camera.py                    # the first camera, /dev/video0
    python camera.py --source 1         # the second one
    python camera.py --source drive.mp4 # a video file: no camera needed
    python camera.py --save out.mp4     # also writes a video with boxes and names

Stop it with Ctrl+C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import cv2

from shoal_agent.client import Box, Class, Client
from shoal_protos.errors import Overloaded, ShoalError


def open_source(text: str) -> Any:
    """A camera by its number, or a video file."""
    source = cv2.VideoCapture(int(text)) if text.isdigit() else cv2.VideoCapture(text)
    if not source.isOpened():
        sys.exit(f"Cannot open {text}. Cameras are listed by: v4l2-ctl --list-devices")
    source.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest picture, not the oldest one that waits
    return source


def look(client: Client, frame: Any, detects: bool) -> Sequence[Box | Class]:
    """OpenCV's frames are blue, green, red: the client must be told."""
    if detects:
        return client.detect(frame, color="bgr")
    return client.classify(frame, color="bgr")


def draw(frame: Any, found: Sequence[Box | Class]) -> None:
    for place, item in enumerate(found):
        corner = (10, 30 + 25 * place)
        if isinstance(item, Box):
            corner = (int(item.x1), int(item.y1) - 5)
            cv2.rectangle(frame, (int(item.x1), int(item.y1)), (int(item.x2), int(item.y2)), (0, 255, 0), 2)
        cv2.putText(frame, item.label, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 255, 0), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description="What a camera sees.")
    parser.add_argument("--source", default="0", help="camera number or video file [%(default)s]")
    parser.add_argument("--server", default="localhost", help="where the agent is [%(default)s]")
    parser.add_argument("--model", default="", help="the endpoint; not needed where there is only one")
    parser.add_argument("--save", default="", help="write a video with what was found")
    options = parser.parse_args()
    source, writer, count, start = open_source(options.source), None, 0, time.monotonic()
    try:
        with Client(options.server, model=options.model) as client:
            detects = client.signature().output_kind == "boxes"
            while True:
                fresh, frame = source.read()
                if not fresh:  # the file's end, or the camera was unplugged
                    break
                try:
                    found = look(client, frame, detects)
                except Overloaded:  # the agent is busy: this picture is left out
                    continue
                count += 1
                print(f"{count:6} {', '.join(map(repr, found)) or 'nothing'}", flush=True)
                if options.save:
                    draw(frame, found)
                    if writer is None:
                        size = (frame.shape[1], frame.shape[0])
                        writer = cv2.VideoWriter(options.save, cv2.VideoWriter.fourcc(*"mp4v"), 25, size)
                    writer.write(frame)
    except KeyboardInterrupt:
        pass
    except ShoalError as error:
        sys.exit(str(error))
    finally:
        source.release()
        if writer is not None:
            writer.release()
    spent = time.monotonic() - start
    print(f"{count} pictures in {spent:.1f} s, {count / max(spent, 1e-9):.1f} a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
