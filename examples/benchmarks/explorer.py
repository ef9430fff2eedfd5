"""How long one move of the explorer's slider takes, from the client's call to the new picture.

    python examples/benchmarks/explorer.py

Serves the page as `latent-aug explore` does and moves eps with Gradio's own client; a browser adds
the drawing. Needs the extra [app].
"""

import statistics
import time

from gradio_client import Client

from latent_aug.diagnostics.app import serve
from latent_aug.flows.hub import bundled_flows

MOVES = 30


def main() -> None:
    """Print a row for each bundled flow."""
    flows = list(bundled_flows())
    page, address = serve(flows, port=None, browser=False)
    client = Client(address, verbose=False)
    print("| flow | one move, median (ms) | slowest of", MOVES, "|\n|---|---|---|")
    for flow in flows:
        client.predict(flow, api_name="/open")
        took = []
        for move in range(MOVES):
            started = time.perf_counter()
            client.predict((move + 1) / MOVES, "linf", "all", "everywhere", api_name="/show")
            took.append(1000 * (time.perf_counter() - started))
        print(f"| `{flow}` | {statistics.median(took):.0f} | {max(took):.0f} |")
    client.close()
    page.close()


if __name__ == "__main__":
    main()
