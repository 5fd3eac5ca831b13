"""A small server with OpenAI's chat completions, in good and in bad moods, for the judge's tests."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer:
    """Replies to every request with `reply(messages)`, unless a mood is left in `moods`: `500`, `429`, `401`, `garbage`
    (no JSON), `half` (the line is cut in the middle of the reply), `empty` (no choice), or any text to reply instead.

    Attributes:
        requests: the bodies, in order of arrival. busiest: the most requests at a time. keys: the keys that came.
    """

    def __init__(self, reply):
        self.reply, self.moods, self.requests, self.keys = reply, [], [], set()
        self.busy = self.busiest = 0
        self.delay = 0.0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append({**body, "path": self.path})
                    server.keys.add(self.headers["Authorization"])
                    mood = server.moods.pop(0) if server.moods else None
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                time.sleep(server.delay)
                with lock:
                    server.busy -= 1
                self.answer(body, mood)

            def answer(self, body, mood):
                status = int(mood) if mood in ("500", "429", "401") else 200
                text = server.reply(body["messages"]) if mood in (None, "half") else mood
                choices = [] if mood == "empty" else [{"index": 0, "finish_reason": "stop",
                                                      "message": {"role": "assistant", "content": text}}]
                content = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "judge-0613",
                                      "choices": choices} if status == 200 else {"error": {"message": "not now"}})
                if mood == "garbage":
                    content = "<html>not JSON"
                data = content.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data[:20] if mood == "half" else data)
                if mood == "half":
                    self.wfile.flush()
                    self.connection.close()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
