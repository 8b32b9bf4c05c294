"use strict";
// The network in the page: onnxruntime-web, its WebAssembly and the ONNX file are parts of it.
(async () => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("playground-data").textContent);
  const status = element("status");

  async function unpacked(id) {
    const packed = Uint8Array.from(atob(element(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  const glue = new Blob([await unpacked("ort-glue")], { type: "text/javascript" });
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = (await unpacked("ort-wasm")).buffer;
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(glue) };
  const options = { executionProviders: ["wasm"] };
  const session = await ort.InferenceSession.create(await unpacked("network"), options);

  // x: channels * height * width values in [-1, 1] -> log_prob, log_level and denoised, as arrays.
  async function inspect(x) {
    const shape = [1, data.channels, data.height, data.width];
    const found = await session.run({ x: new ort.Tensor("float32", x, shape) });
    return Object.fromEntries(Object.entries(found).map(([name, tensor]) => [name, tensor.data]));
  }

  const pen = element("draw").getContext("2d", { willReadFrequently: true });
  const { width, height } = element("draw");
  const cell = data.cell;
  const plane = data.height * data.width;
  const values = data.channels * plane;

  function normal() {
    return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  }
  let noise = Float32Array.from({ length: values }, normal);

  // The drawing's brightness, averaged over each pixel of the network, as the model's input.
  function drawing() {
    const pixels = pen.getImageData(0, 0, width, height).data;
    const x = new Float32Array(values);
    for (let i = 0; i < plane; i++) {
      const top = Math.floor(i / data.width) * cell;
      const left = (i % data.width) * cell;
      for (let channel = 0; channel < data.channels; channel++) {
        let sum = 0;
        for (let row = top; row < top + cell; row++) {
          for (let column = left; column < left + cell; column++) {
            sum += pixels[4 * (row * width + column) + channel];
          }
        }
        x[channel * plane + i] = data.scale * (sum / (255 * cell * cell)) + data.shift;
      }
    }
    return x;
  }

  function show(canvas, x) {
    const context = canvas.getContext("2d");
    const picture = context.createImageData(data.width, data.height);
    for (let i = 0; i < plane; i++) {
      for (let k = 0; k < 3; k++) {
        const value = x[(data.channels === 3 ? k * plane : 0) + i];
        picture.data[4 * i + k] = 255 * Math.min(1, Math.max(0, (value - data.shift) / data.scale));
      }
      picture.data[4 * i + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
  }

  function showLevels(logLevel) {
    const canvas = element("level-curve");
    const context = canvas.getContext("2d");
    const { width, height } = canvas;
    const most = Math.exp(Math.max(...logLevel));
    context.clearRect(0, 0, width, height);
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    context.lineWidth = 2;
    context.beginPath();
    logLevel.forEach((value, level) => {
      const x = 2 + ((width - 4) * level) / (logLevel.length - 1);
      context.lineTo(x, height - 2 - ((height - 6) * Math.exp(value)) / most);
    });
    context.stroke();
  }

  const rows = data.names.map((name) => {
    const row = element("class-bars").insertRow();
    const head = document.createElement("th");
    head.textContent = name;
    row.append(head);
    const bar = row.insertCell();
    bar.className = "bar";
    bar.append(document.createElement("i"));
    row.insertCell();
    return row;
  });

  function showClasses(logProb) {
    const most = Math.max(...logProb);
    const total = logProb.reduce((sum, value) => sum + Math.exp(value - most), 0);
    rows.forEach((row, index) => {
      const share = rows.length > 1 ? Math.exp(logProb[index] - most) / total : 0; // without classes no bar
      row.querySelector("i").style.width = `${100 * share}%`;
      row.cells[2].textContent = logProb[index].toFixed(1);
    });
  }

  // One pass of the network on the drawing with noise, and what it shows.
  async function pass() {
    const level = Number(element("noise").value);
    const clean = drawing();
    const x = clean.map((value, i) => data.a[level] * value + data.s[level] * noise[i]);
    const began = performance.now();
    const found = await inspect(x);
    const best = found.log_level.indexOf(Math.max(...found.log_level));
    element("noise-word").textContent = level;
    element("level").textContent = best;
    show(element("seen"), x);
    show(element("denoised"), found.denoised);
    showLevels(Array.from(found.log_level));
    showClasses(Array.from(found.log_prob));
    status.textContent = `${Math.round(performance.now() - began)} ms a pass`;
  }

  let busy = false;
  let waiting = false;
  async function update() {
    if (busy) {
      waiting = true;
      return;
    }
    busy = true;
    try {
      await pass();
    } catch (error) {
      status.textContent = `the network failed: ${error}`;
      console.error(error);
    } finally {
      busy = false;
    }
    if (waiting) {
      waiting = false;
      update();
    }
  }

  function clear() {
    pen.fillStyle = "black";
    pen.fillRect(0, 0, width, height);
  }

  let last = null;
  function stroke(event) {
    const box = element("draw").getBoundingClientRect();
    const at = [((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height];
    pen.strokeStyle = "white";
    pen.lineWidth = Math.min(width, height) / 8;
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(...(last || at));
    pen.lineTo(...at);
    pen.stroke();
    last = at;
    update();
  }

  element("draw").addEventListener("pointerdown", (event) => {
    element("draw").setPointerCapture(event.pointerId);
    last = null;
    stroke(event);
  });
  element("draw").addEventListener("pointermove", (event) => event.buttons && stroke(event));
  element("clear").addEventListener("click", () => {
    clear();
    update();
  });
  element("noise").addEventListener("input", () => {
    noise = Float32Array.from({ length: values }, normal);
    update();
  });

  let next = 0;
  function example() {
    const image = data.examples[next++ % data.examples.length];
    for (let i = 0; i < plane; i++) {
      const [red, green, blue] = [0, 1, 2].map((k) => image[(data.channels === 3 ? k * plane : 0) + i]);
      pen.fillStyle = `rgb(${red}, ${green}, ${blue})`;
      pen.fillRect((i % data.width) * cell, Math.floor(i / data.width) * cell, cell, cell);
    }
    update();
  }
  element("example")?.addEventListener("click", example);

  clear();
  if (data.examples.length) example();
  else update();
  window.playground = { inspect, update };
})().catch((error) => {
  document.getElementById("status").textContent = `the network could not be started: ${error}`;
  console.error(error);
});
