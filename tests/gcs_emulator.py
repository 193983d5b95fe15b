"""`python gcs_emulator.py PORT`: a Cloud Storage emulator that heeds `ifGenerationMatch=0`.

With it an object is written only if there is none of that name. The emulator knows nothing of it,
and a bucket in which two are first at once is no test of anything.
"""

import socketserver
import sys
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

_upload = objects._multipart_upload


def _conditional_upload(request: Any, response: Any, storage: Any) -> None:
    if request.query.get("ifGenerationMatch") == ["0"]:
        try:
            storage.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
        except NotFound:
            pass
        else:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
    _upload(request, response, storage)


if __name__ == "__main__":
    # The library lets five connections wait. Of more, which gcsfs opens for as many files, the
    # kernel drops some, and they are tried again after 1, 3, 7, ... seconds.
    socketserver.TCPServer.request_queue_size = 512
    objects._multipart_upload = _conditional_upload
    create_server("127.0.0.1", int(sys.argv[1]), True).run()
