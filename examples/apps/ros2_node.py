"""A ROS 2 node: pictures from a topic in, boxes (or a name) on another topic out.

    # in a workspace with rclpy, sensor_msgs and vision_msgs (ROS 2 Humble or later):
    pip install 'shoal[client]'
    python3 ros2_node.py --ros-args -r image:=/camera/image_raw -p server:=localhost -p model:=signs

Subscribes `image` (sensor_msgs/Image: rgb8, bgr8 or mono8), publishes `detections`
(vision_msgs/Detection2DArray) for a detector, `classification` (vision_msgs/Classification) else.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_agent.client import Box, Class, Client
from shoal_protos.errors import InvalidInput, Overloaded, ShoalError

COLORS = {"rgb8": ("rgb", 3), "bgr8": ("bgr", 3), "mono8": ("gray", 1)}


@dataclass(frozen=True)
class Seen:
    """What was found in one picture; `stamp` and `frame_id` are the picture's own."""

    header: Any
    found: list[Box] | list[Class]


def frame_of(message: Any) -> tuple[np.ndarray[Any, Any], str]:
    """A sensor_msgs/Image as (uint8 [height, width, channels], its color). Rows may be padded.

    Raises:
        InvalidInput: an encoding that this node does not read, or a message that is cut off.
    """
    if message.encoding not in COLORS:
        raise InvalidInput(
            f"The encoding {message.encoding} is not read here.", f"Publish {', '.join(COLORS)}."
        )
    color, channels = COLORS[message.encoding]
    size = message.step * message.height
    if message.step < message.width * channels or len(message.data) < size:
        raise InvalidInput("The picture is cut off.")
    rows = np.frombuffer(bytes(message.data), np.uint8, size).reshape(message.height, message.step)
    used = rows[:, : message.width * channels]
    return used.reshape(message.height, message.width, channels), color


def look(client: Client, message: Any) -> Seen:
    """From message to answer: everything of the callback that needs no ROS."""
    frame, color = frame_of(message)
    if client.signature().output_kind == "boxes":
        return Seen(message.header, client.detect(frame, color=color))
    return Seen(message.header, client.classify(frame, color=color))


def run() -> int:
    import rclpy
    from rclpy.node import Node
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image
    from vision_msgs.msg import (
        Classification,
        Detection2D,
        Detection2DArray,
        ObjectHypothesis,
        ObjectHypothesisWithPose,
    )

    class Shoal(Node):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__("shoal")
            server = self.declare_parameter("server", "localhost").value
            model = self.declare_parameter("model", "").value
            self.client = Client(server, model=model)
            self.boxes = self.create_publisher(Detection2DArray, "detections", 10)
            self.names = self.create_publisher(Classification, "classification", 10)
            # Sensor data: the newest picture counts, lost ones are not sent again.
            self.create_subscription(Image, "image", self.on_image, qos_profile_sensor_data)

        def on_image(self, message: Any) -> None:
            try:
                seen = look(self.client, message)
            except Overloaded:  # the agent is busy: this picture is left out
                return
            except ShoalError as error:
                self.get_logger().warning(str(error), throttle_duration_sec=5.0)
                return
            names = [item for item in seen.found if isinstance(item, Class)]
            if names:
                answer = Classification(header=seen.header)
                for item in names:
                    answer.results.append(
                        ObjectHypothesis(class_id=item.label, score=float(item.probability))
                    )
                self.names.publish(answer)
                return
            array = Detection2DArray(header=seen.header)
            for box in (item for item in seen.found if isinstance(item, Box)):
                one = Detection2D(header=seen.header)
                one.bbox.center.position.x = (box.x1 + box.x2) / 2
                one.bbox.center.position.y = (box.y1 + box.y2) / 2
                one.bbox.size_x, one.bbox.size_y = box.x2 - box.x1, box.y2 - box.y1
                result = ObjectHypothesisWithPose()
                result.hypothesis.class_id, result.hypothesis.score = box.label, float(box.score)
                one.results.append(result)
                array.detections.append(one)
            self.boxes.publish(array)

    rclpy.init()
    node = Shoal()
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        node.client.close()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run())
