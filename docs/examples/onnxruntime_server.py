"""Serve an exported model over HTTP with ONNX Runtime and NumPy alone: neither torch nor hq_plugin is needed.

    python docs/examples/onnxruntime_server.py small.onnx --port 8000

It answers on loopback; what it takes and gives are arrays in NumPy's `.npy` format. For the internet take a real
server (Triton, or any WSGI server): this one only shows how little there is to it.
"""

import argparse
import io
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser(description="Serve an ONNX model on loopback.")
parser.add_argument("model")
parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
parser.add_argument("--threads", type=int, default=1, help="of one request")
options = parser.parse_args()

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = options.threads
settings.add_session_config_entry("session.x64quantprecision", "1")  # x86 without VNNI would clip sums
session = onnxruntime.InferenceSession(options.model, settings, providers=["CPUExecutionProvider"])
(entry, *_) = session.get_inputs()


class Handler(BaseHTTPRequestHandler):
    """`POST` an array `[samples, ...]`, get the model's first output."""

    def do_POST(self) -> None:
        """Runs the model; threads share one session, which is safe."""
        try:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            inputs = np.load(io.BytesIO(body), allow_pickle=False)
            output = session.run(None, {entry.name: inputs})[0]
        except Exception as error:  # whatever a client sent, the server goes on
            self.send_error(400, str(error).splitlines()[0])
            return
        reply = io.BytesIO()
        np.save(reply, output)
        self.send_response(200)
        self.send_header("Content-Type", "application/x-npy")
        self.end_headers()
        self.wfile.write(reply.getvalue())

    def log_message(self, *_: object) -> None:
        """Says nothing of requests."""


server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
print(f"serving {options.model} ({entry.name} {entry.shape}) on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
