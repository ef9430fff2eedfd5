"""The explorer's page, served as its command serves it; in a browser where there is one."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

if importlib.util.find_spec("gradio") is None:  # to import it would take seconds
    pytest.skip("the page needs gradio", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's packages

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def outside():
    """A proxy that whoever asks for something on the network would come to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(outside, tmp_path_factory):
    """Of a running `latent-aug explore`."""
    proxy = "http://{}:{}".format(*outside.getsockname())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        environment[name] = proxy
    environment["no_proxy"] = environment["NO_PROXY"] = "127.0.0.1,localhost"
    environment["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    command = [sys.executable, "-m", "latent_aug", "explore", "--no-browser"]
    server = subprocess.Popen(
        [*command, "--port", str(free_port())], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = server.stdout.readline()  # empty where it ended without one
        assert line.startswith("http://127.0.0.1:"), line
        yield line.split()[0]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def client(address):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(address, verbose=False)
    yield client
    client.close()


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return path


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.jpg"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(path)
    return path


def sources(text):
    """Of the images in a page or in a piece of one."""
    return re.findall(r'src="(data:image/png[^"]+)"', text)


def test_a_slider_moves_the_picture(client):
    client.predict("glow-fashionmnist", api_name="/open")
    first, second = (
        sources(client.predict(eps, "linf", "all", "everywhere", api_name="/show"))
        for eps in (0.1, 0.5)
    )
    assert len(first) == 3
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_levels_are_those_of_the_flow(client):
    *_, levels = client.predict("glow-cifar10-small", api_name="/open")
    assert [value for value, _ in levels["choices"]] == ["all", "0 (finest)", "1", "2 (coarsest)"]
    shown = [
        client.predict(0.4, "linf", level, "everywhere", api_name="/show")
        for level in ("all", "0 (finest)", "2 (coarsest)")
    ]
    assert len({sources(text)[1] for text in shown}) == 3


def test_strip_and_samples(client):
    client.predict("glow-fashionmnist", api_name="/open")
    row = client.predict(0.25, "l2", "all", "everywhere", api_name="/strip")
    assert re.findall(r"<figcaption>(.*?)<", row) == ["l2 4", "l2 10", "l2 20", "l2 30", "l2 40"]
    assert len(set(sources(row))) == 5
    drawn = client.predict("glow-fashionmnist", 3, api_name="/samples")
    assert len(set(sources(drawn))) == 6


def test_the_attack_goes_step_by_step(client):
    client.predict("glow-fashionmnist", api_name="/open")
    job = client.submit(0.1, 0.05, 3, "linf", "all", "everywhere", api_name="/attack")
    job.result(60)
    last, probabilities = job.outputs()[-1]
    losses = [float(loss) for loss in re.findall(r"<figcaption>[^<]+loss ([\d.]+)", last)]
    assert len(losses) == 4
    assert len(sources(last)) == 5  # and the difference
    assert len(probabilities["confidences"]) == 4
    assert losses[-1] > losses[0] + 0.5


def test_a_copy_changes_the_picture_and_the_code(client):
    client.predict("glow-photographs", api_name="/open")
    by_copy = sources(client.predict(0.3, "linf", "all", "everywhere", api_name="/show"))
    assert "resolution=32" in client.predict(0.3, "linf", "all", "everywhere", api_name="/code")
    client.predict("none", api_name="/encode")
    whole = sources(client.predict(0.3, "linf", "all", "everywhere", api_name="/show"))
    assert whole[0] == by_copy[0]
    assert whole[1] != by_copy[1]
    code = client.predict(0.3, "linf", "all", "everywhere", api_name="/code")
    assert "eps=0.3," in code
    assert "resolution" not in code
    attack = client.predict(0.1, 0.05, 3, "linf", "all", "everywhere", api_name="/attack_code")
    assert "LatentAdversarial(" in attack
    assert "steps=3," in attack


def test_errors_are_messages(client, broken):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    client.predict("glow-cifar10-small", api_name="/open")
    with pytest.raises(AppError, match=r"broken.*is not an image"):
        client.predict("glow-cifar10-small", handle_file(broken), 32, api_name="/upload")
    with pytest.raises(AppError, match="knows grey images"):
        client.predict(0.1, 0.05, 3, "linf", "all", "everywhere", api_name="/attack")


@pytest.mark.parametrize("flow", ["/tmp", "someone/flow"])
def test_a_page_cannot_open_other_flows(client, flow):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=r"not in the list of choices"):
        client.predict(flow, api_name="/open")


def test_an_upload_is_shown(client, photograph):
    from gradio_client import handle_file

    client.predict("glow-cifar10-small", api_name="/open")
    before = sources(client.predict(0.1, "linf", "all", "everywhere", api_name="/show"))
    client.predict("glow-cifar10-small", handle_file(photograph), 48, api_name="/upload")
    after = sources(client.predict(0.1, "linf", "all", "everywhere", api_name="/show"))
    assert before[0] != after[0]


def test_too_large_a_file_is_refused_at_the_door(address):
    httpx = pytest.importorskip("httpx")  # of gradio_client
    for size, status in ((10, 200), (9 * 2**20, 413)):
        files = {"files": ("image.png", bytes(size))}
        answer = httpx.post(f"{address}gradio_api/upload", files=files, trust_env=False)
        assert answer.status_code == status


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address")
def test_only_this_machine_is_answered(address):
    port = int(re.search(r":(\d+)", address.removeprefix("http:"))[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_flow_that_is_not_there_is_one_line():
    from typer.testing import CliRunner

    from latent_aug.cli import app as cli

    result = CliRunner().invoke(cli, ["explore", "--flow", "nowhere", "--no-browser"])
    assert result.exit_code == 1
    assert "there is no flow 'nowhere'" in result.output


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1300,1200")
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def until(function, seconds=30):
    """What a function gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := function()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


def requested(browser):
    """Addresses of everything that the page asked the network for."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its driver on PATH")
def test_in_a_browser(address, browser, broken, photograph):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def shown():
        script = "return [...document.querySelectorAll('#three img')].map(image => image.src)"
        return browser.execute_script(script)  # all at one moment

    browser.get(address)
    until(lambda: len(shown()) == 3 and len(find("#strip img")) == 5)
    time.sleep(1)  # events of the page's start are over
    before = shown()
    find("#eps input[type=range]")[0].send_keys(*[Keys.ARROW_RIGHT] * 20)
    after = until(lambda: (now := shown()) and now[1] != before[1] and now)
    assert after[0] == before[0]
    assert len(after) == 3

    find("#copy-random")[0].click()
    script = "return document.querySelector('.cm-content')?.textContent || ''"
    until(lambda: "resolution=32" in browser.execute_script(script))

    find("#examples .grid-container button")[1].click()
    before = until(lambda: (now := shown()) and now[0] != before[0] and now)

    find("#upload input[type=file]")[0].send_keys(str(broken))
    until(
        lambda: "is not an image that can be read" in browser.find_element(By.TAG_NAME, "body").text
    )
    assert shown()[0] == before[0]

    find("#upload button[aria-label=Clear]")[0].click()
    until(lambda: find("#upload input[type=file]"))[0].send_keys(str(photograph))
    until(lambda: len(shown()) == 3 and shown()[0] != before[0])

    urls = [url for url in requested(browser) if not url.startswith(("data:", "blob:"))]
    assert len(urls) > 5
    assert [url for url in urls if not url.startswith(address)] == []


def test_nothing_came_to_the_proxy(address, outside):
    """The last test: whatever the page did so far, it asked nobody else."""
    with pytest.raises(BlockingIOError):
        outside.accept()
