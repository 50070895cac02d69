"""What the stand-in for the Hub does when it is written to: the routes of create_repo and upload_folder."""

import base64
import json
import re
from pathlib import Path

ROUTES = {
    "create": re.compile(r"/api/repos/(create)"),
    "validate": re.compile(r"/api/(validate-yaml)"),
    "preupload": re.compile(r"/api/datasets/([^/]+/[^/]+)/preupload/([^/]+)"),
    "commit": re.compile(r"/api/datasets/([^/]+/[^/]+)/commit/([^/]+)"),
}


def take(hub: str, root: Path, route: str, parts: list[str], body: bytes) -> tuple[int, dict]:
    """Return (status, answer) of a request to `hub` that writes below `root`; every file comes inside the commit."""
    if route == "validate":
        return 200, {"warnings": [], "errors": []}
    if route == "create":
        told = json.loads(body)
        name = told["name"] if "/" in told["name"] else f"{told['organization']}/{told['name']}"
        answer = {"url": f"{hub}/datasets/{name}", "id": name}
        if (root / name).exists():
            return 409, answer | {"error": "You already created this dataset repo"}
        (root / name).mkdir(parents=True)
        return 200, answer
    folder = root / parts[0]
    if not folder.is_dir():
        return 404, {"error": "Repository not found"}
    if route == "preupload":
        files = json.loads(body)["files"]
        kept = {"uploadMode": "regular", "shouldIgnore": False}
        return 200, {"files": [{"path": file["path"]} | kept for file in files]}
    for line in body.splitlines():
        told = json.loads(line)
        if told["key"] == "file":
            path = folder / told["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(told["value"]["content"]))
        elif told["key"] == "deletedFile":
            (folder / told["value"]["path"]).unlink()
    url = f"{hub}/datasets/{parts[0]}/commit/0"
    return 200, {"commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None}
