"""Operations: the host runs programs here."""

from .base import b64, unb64
from .command import Command
from .terminal import set_window


class Commands:
    def __init__(self, loop, channel, identity):
        self.loop, self.channel, self.identity = loop, channel, identity
        self.outputs = loop.group()  # what commands write; muted while the control port is full
        self.running = {}

    def __len__(self):
        return len(self.running)

    def end_all(self):
        for command in self.running.values():
            command.signal(9)

    def end_late(self, now):
        for command in list(self.running.values()):
            if command.deadline is not None and now > command.deadline:
                command.timed_out, command.deadline = True, None
                command.signal(9)

    def take_stdin(self, number, data):
        command = self.running.get(number)
        if command is not None:
            command.feed(data, end=False)

    def op_exec(self, message):
        number = message["id"]
        try:
            self.running[number] = Command(self, number, message, self.identity.env)
        except (OSError, KeyError) as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126
            self.channel.send({"id": number, "err": b64(f"{message['argv'][0]}: {error}\n".encode())})
            return {"exit": code, "timed_out": False}
        return None

    def op_stdin(self, message):
        command = self.running.get(message["id"])
        if command is not None:
            command.feed(unb64(message.get("data") or ""), end=bool(message.get("eof")))

    def op_resize(self, message):
        command = self.running.get(message["id"])
        if command is not None and command.terminal is not None:
            set_window(command.terminal, message)

    def op_hang_up(self, message):
        command = self.running.get(message["id"])
        if command is not None:
            command.hang_up(message["output"])

    def op_ack(self, message):
        command = self.running.get(message["id"])
        if command is not None:
            command.acknowledge(message["bytes"])

    def op_signal(self, message):
        command = self.running.get(message["id"])
        if command is not None:
            command.signal(message["signal"])
