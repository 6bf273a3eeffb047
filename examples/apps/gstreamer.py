"""What a GStreamer pipeline sees: any source that GStreamer knows, read at an `appsink`.

    sudo apt-get install python3-gi gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 \\
        gstreamer1.0-plugins-good
    python3 -m venv --system-site-packages venv && venv/bin/pip install 'shoal[client]'

    venv/bin/python gstreamer.py --source 'v4l2src device=/dev/video0'
    venv/bin/python gstreamer.py --source 'rtspsrc location=rtsp://camera/stream latency=0 ! decodebin'
    venv/bin/python gstreamer.py --source 'videotestsrc num-buffers=20'   # no camera needed

The sink keeps one picture and drops older ones, so that a slow model sees the present.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from shoal_agent.client import Client
from shoal_protos.errors import Overloaded, ShoalError

SINK = "videoconvert ! video/x-raw,format=RGB ! appsink name=sink max-buffers=1 drop=true sync=false"


def frame_of(data: bytes, width: int, height: int) -> np.ndarray[Any, Any]:
    """A buffer of format RGB as [height, width, 3]; GStreamer fills each row up to 4 bytes."""
    stride = -(-width * 3 // 4) * 4
    rows = np.frombuffer(data, np.uint8, stride * height).reshape(height, stride)
    return rows[:, : width * 3].reshape(height, width, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description="What a GStreamer pipeline sees.")
    parser.add_argument("--source", default="v4l2src", help="the pipeline's start [%(default)s]")
    parser.add_argument("--server", default="localhost", help="where the agent is [%(default)s]")
    parser.add_argument("--model", default="", help="the endpoint; not needed where there is only one")
    options = parser.parse_args()

    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstApp", "1.0")
    from gi.repository import GLib, Gst, GstApp  # noqa: F401 - GstApp adds try_pull_sample

    Gst.init(None)
    try:
        pipeline = Gst.parse_launch(f"{options.source} ! {SINK}")
    except GLib.Error as error:
        sys.exit(f"The pipeline is wrong: {error.message}")
    sink = pipeline.get_by_name("sink")
    count = 0
    try:
        with Client(options.server, model=options.model) as client:
            detects = client.signature().output_kind == "boxes"
            pipeline.set_state(Gst.State.PLAYING)
            while True:
                sample = sink.try_pull_sample(5 * Gst.SECOND)
                if sample is None:  # the end, or nothing for five seconds
                    break
                form = sample.get_caps().get_structure(0)
                buffer = sample.get_buffer()
                data = buffer.extract_dup(0, buffer.get_size())
                frame = frame_of(data, form.get_value("width"), form.get_value("height"))
                ask = client.detect if detects else client.classify
                try:
                    found = ask(frame, color="rgb")
                except Overloaded:  # the agent is busy: this picture is left out
                    continue
                count += 1
                print(f"{count:6} {', '.join(map(repr, found)) or 'nothing'}", flush=True)
    except KeyboardInterrupt:
        pass
    except ShoalError as error:
        sys.exit(str(error))
    finally:
        pipeline.set_state(Gst.State.NULL)
    message = pipeline.get_bus().pop_filtered(Gst.MessageType.ERROR)
    if message is not None:
        sys.exit(f"GStreamer: {message.parse_error()[0].message}")
    print(f"{count} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
