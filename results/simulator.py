"""franka-sim with a hand like the real one, faults to switch on, and a log of what the arm does. Who starts it does so
in an environment of its own, as franka-sim pins numpy 1.

    python results/simulator.py FOLDER PORT LOST [enforce]

A file FOLDER/stuck holds the fingers, FOLDER/unplugged takes the cable out. FOLDER/motion gets 10 float64 a line: the
time (time.monotonic), the seven joint angles, the width of the hand (m), and the time of the simulation, which is
slower where the machine is busy. With `enforce`, LOST cycles in a row without a command are a reflex:
20 on a real arm, but a busy machine without a real-time kernel loses as many now and then.
"""

import os
import socket
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import franka_sim
import mujoco
import numpy as np
from franka_sim.comm_constraints import CommConstraintTracker
from franka_sim.franka_sim_server import FrankaSimServer
from franka_sim.gripper.backend import FrankaHandSim
from franka_sim.gripper.protocol import GripperCommand
from franka_sim.gripper.server import FrankaGripperServer

folder = Path(sys.argv[1])


def write_model(path: Path) -> None:
    """The FR3 of franka-sim without meshes, which would have to be downloaded."""
    robot = ET.parse(Path(franka_sim.__file__).parent / "models/fr3.urdf").getroot()
    for link in robot.iter("link"):
        for part in link.findall("visual") + link.findall("collision"):
            link.remove(part)
    spec = mujoco.MjSpec.from_string(ET.tostring(robot).decode())
    for joint in spec.joints:  # without them the arm oscillates, and franka-rs stops with a deviation
        joint.damping = 1.0
        joint.armature = 0.3
    spec.compile()
    path.write_text(spec.to_xml())


class Hand(FrankaHandSim):
    """Fingers that take their time and can be stopped on their way, as libfranka documents; those of franka-sim arrive
    at once, and its `stop` opens them. A command that was stopped fails, and so does one that comes during another."""

    def __init__(self):
        super().__init__()
        self.moving = threading.Lock()
        self.stopped = threading.Event()

    def travel(self, width, speed):
        if not self.moving.acquire(blocking=False):
            raise RuntimeError("the hand is moving")
        try:
            self.stopped.clear()
            while abs(width - self.width) > 1e-6:
                if self.stopped.wait(0.01):
                    raise RuntimeError("stopped")
                if not (folder / "stuck").exists():
                    self.width += float(np.clip(width - self.width, -0.01 * speed, 0.01 * speed))
        finally:
            self.moving.release()
        return True

    def move(self, width, speed):
        return self.travel(width, speed)

    def grasp(self, width, epsilon_inner, epsilon_outer, speed, force):
        return self.travel(0.0, speed)

    def stop(self):
        self.stopped.set()
        return True


class HandServer(FrankaGripperServer):
    """Reads on while a command runs, or `stop` would not be heard."""

    def _dispatch_command(self, sock, header, payload):
        if header.command == GripperCommand.kStop:
            super()._dispatch_command(sock, header, payload)
        else:
            threading.Thread(target=super()._dispatch_command, args=(sock, header, payload), daemon=True).start()


class Cable(socket.socket):
    """A socket whose datagrams, the arm's states and commands, are lost while the cable is out."""

    def sendto(self, data, address):
        return len(data) if (folder / "unplugged").exists() else super().sendto(data, address)

    def recvfrom(self, size):
        data, sender = super().recvfrom(size)
        return (b"" if (folder / "unplugged").exists() else data), sender


def log_motion(physics, hand: Hand) -> None:
    while physics.data is None or physics.data.time == 0:  # the first state that is published is not the arm's
        time.sleep(0.1)
    with open(folder / "motion", "ab", buffering=0) as log:
        while True:
            q = physics.get_robot_state()["q"][:7]
            log.write(np.array([time.monotonic(), *q, hand.width, physics.data.time]).tobytes())
            time.sleep(0.01)


if __name__ == "__main__":
    write_model(folder / "fr3.xml")
    os.environ["FR3_MJCF"] = str(folder / "fr3.xml")
    socket.socket = Cable
    enforce = "enforce" in sys.argv
    server = FrankaSimServer(port=int(sys.argv[2]), enforce_comm_constraints=enforce, enforce_motion_limits=True)
    server.comm = CommConstraintTracker(enforce=enforce, max_consecutive_lost=int(sys.argv[3]))
    hand = Hand()
    server.gripper_server = HandServer(host=server.gripper_server.host, backend=hand)
    threading.Thread(target=log_motion, args=(server.physics_sim, hand), daemon=True).start()
    server.start()
