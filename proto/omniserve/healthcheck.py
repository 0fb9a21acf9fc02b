"""`python -m omniserve.healthcheck HOST:PORT`: exits 0 if the server there says SERVING, else 1.

For container health checks: it needs no more than gRPC.
"""

from __future__ import annotations

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from omniserve.channel import tls_credentials
from omniserve.errors import SettingsError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m omniserve.healthcheck", description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--tls-ca-file", help="PEM file to trust; the server's own will do")
    parser.add_argument("--tls-server-name", help="name in its certificate, if not HOST")
    parser.add_argument("--timeout-s", type=float, default=2.0)
    options = parser.parse_args()
    try:
        with _channel(options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=options.timeout_s)
    except SettingsError as error:
        parser.error(error.message)
    except grpc.RpcError as error:
        sys.exit(f"{options.address}: {error.code().name}: {error.details()}")
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{options.address}: {status}")
    sys.exit(status != "SERVING")


def _channel(options: argparse.Namespace) -> grpc.Channel:
    if not options.tls_ca_file:
        return grpc.insecure_channel(options.address)
    name = options.tls_server_name
    target = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(options.address, tls_credentials(options.tls_ca_file), target)


if __name__ == "__main__":
    main()
