// Maps on the model's anatomy: tiles of all layers, a flat map, and one layer with a cursor.

const GAP = 6; // pixels between tiles

class Anatomy {
  constructor(space) {
    this.widths = space.widths;
    [this.columns, this.rows] = space.grid;
    this.layers = space.widths.length;
    this.offsets = [0];
    for (const width of space.widths) this.offsets.push(this.offsets.at(-1) + width);
    this.widest = Math.max(...space.widths);
  }

  layer(values, layer) {
    return values.subarray(this.offsets[layer], this.offsets[layer + 1]);
  }
}

// Neurons of one layer as an image; where pixels are fewer than neurons, the strongest of a pixel is shown.
function layerImage(anatomy, values, limit, floor, pool) {
  const width = Math.ceil(anatomy.columns / pool);
  const height = Math.ceil(anatomy.rows / pool);
  const strongest = new Float32Array(width * height);
  const real = new Uint8Array(width * height);
  for (let i = 0; i < values.length; i++) {
    const x = Math.floor((i % anatomy.columns) / pool);
    const y = Math.floor(Math.floor(i / anatomy.columns) / pool);
    const at = y * width + x;
    real[at] = 1;
    if (Math.abs(values[i]) > Math.abs(strongest[at])) strongest[at] = values[i];
  }
  return paint(strongest, real, width, height, limit, floor);
}

// Layers as rows, neurons from left to right.
function flatImage(anatomy, values, limit, floor, width) {
  const bins = Math.min(width, anatomy.widest);
  const strongest = new Float32Array(bins * anatomy.layers);
  const real = new Uint8Array(bins * anatomy.layers);
  for (let layer = 0; layer < anatomy.layers; layer++) {
    const part = anatomy.layer(values, layer);
    for (let i = 0; i < part.length; i++) {
      const at = layer * bins + Math.floor((i * bins) / anatomy.widest);
      real[at] = 1;
      if (Math.abs(part[i]) > Math.abs(strongest[at])) strongest[at] = part[i];
    }
  }
  return paint(strongest, real, bins, anatomy.layers, limit, floor);
}

function paint(values, real, width, height, limit, floor) {
  const image = new ImageData(width, height);
  const ramp = colour.ramp;
  for (let i = 0; i < values.length; i++) {
    const from = colour.index(Math.abs(values[i]) < floor ? 0 : values[i], limit);
    image.data[4 * i] = ramp[from];
    image.data[4 * i + 1] = ramp[from + 1];
    image.data[4 * i + 2] = ramp[from + 2];
    image.data[4 * i + 3] = real[i] ? 255 : 0;
  }
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

class Overview {
  constructor(canvas, anatomy) {
    this.canvas = canvas;
    this.anatomy = anatomy;
    this.tiles = [];
  }

  // How many tiles side by side make them largest within the width and about 460 pixels of height.
  layout(width) {
    const { columns, rows, layers } = this.anatomy;
    let best = null;
    for (let across = 1; across <= layers; across++) {
      const tile = Math.floor((width - GAP * (across - 1)) / across);
      const tall = (tile * rows) / columns;
      const down = Math.ceil(layers / across);
      const height = down * (tall + 14 + GAP);
      const fit = Math.min(1, 460 / height);
      if (tile >= 8 && (!best || tile * fit > best.tile * best.fit + 0.5)) best = { across, tile, fit };
    }
    const { across, tile, fit } = best || { across: layers, tile: 8, fit: 1 };
    const size = Math.max(6, Math.floor(tile * fit));
    return { across, size, tall: Math.max(6, Math.round((size * rows) / columns)) };
  }

  draw(values, limit, floor, view, layer) {
    const width = this.canvas.parentElement.clientWidth - this.padding();
    this.tiles = [];
    if (view === "flat") this.drawFlat(values, limit, floor, layer);
    else this.drawTiles(values, limit, floor, layer, width);
  }

  padding() {
    const style = getComputedStyle(this.canvas.parentElement);
    return parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
  }

  drawTiles(values, limit, floor, layer, width) {
    const { anatomy } = this;
    const { across, size, tall } = this.layout(width);
    const down = Math.ceil(anatomy.layers / across);
    const { context, ratio } = prepare(this.canvas, down * (tall + 14 + GAP));
    const pool = Math.max(1, Math.ceil(anatomy.columns / (size * ratio)));
    context.imageSmoothingEnabled = false;
    context.font = "10px system-ui, sans-serif";
    context.textBaseline = "alphabetic";
    for (let l = 0; l < anatomy.layers; l++) {
      const x = (l % across) * (size + GAP);
      const y = Math.floor(l / across) * (tall + 14 + GAP) + 12;
      const image = layerImage(anatomy, anatomy.layer(values, l), limit, floor, pool);
      context.drawImage(image, x, y, size, tall);
      context.strokeStyle = colour.of(l === layer ? "--focus" : "--line");
      context.lineWidth = l === layer ? 2.5 : 1;
      context.strokeRect(x + 0.5, y + 0.5, size - 1, tall - 1);
      context.fillStyle = colour.of(l === layer ? "--ink" : "--quiet");
      if (size >= 14 || l % 4 === 0) context.fillText(String(l), x, y - 3);
      this.tiles.push({ x, y, width: size, height: tall, layer: l });
    }
  }

  drawFlat(values, limit, floor, layer) {
    const { anatomy } = this;
    const tall = Math.max(5, Math.min(26, Math.floor(430 / anatomy.layers)));
    const { context, width, ratio } = prepare(this.canvas, tall * anatomy.layers + 4);
    const left = 26;
    const image = flatImage(anatomy, values, limit, floor, Math.round((width - left) * ratio));
    context.imageSmoothingEnabled = false;
    context.drawImage(image, left, 2, width - left, tall * anatomy.layers);
    context.font = "10px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(12 / tall));
    for (let l = 0; l < anatomy.layers; l++) {
      context.fillStyle = colour.of(l === layer ? "--ink" : "--quiet");
      if (l % every === 0 || l === layer) context.fillText(String(l), left - 6, 2 + (l + 0.5) * tall);
      this.tiles.push({ x: left, y: 2 + l * tall, width: width - left, height: tall, layer: l, flat: true });
    }
    context.strokeStyle = colour.of("--focus");
    context.lineWidth = 2;
    context.strokeRect(left, 2 + layer * tall, width - left - 1, tall);
  }

  // {layer, neuron} at a point of the canvas, or null.
  at(x, y) {
    const { anatomy } = this;
    const tile = this.tiles.find((t) => x >= t.x && x < t.x + t.width && y >= t.y && y < t.y + t.height);
    if (!tile) return null;
    const u = (x - tile.x) / tile.width;
    const neuron = tile.flat
      ? Math.floor(u * anatomy.widest)
      : Math.floor(((y - tile.y) / tile.height) * anatomy.rows) * anatomy.columns + Math.floor(u * anatomy.columns);
    return { layer: tile.layer, neuron: neuron < anatomy.widths[tile.layer] ? neuron : null };
  }
}

class Slice {
  constructor(canvas, anatomy) {
    this.canvas = canvas;
    this.anatomy = anatomy;
    this.cell = 1;
  }

  draw(values, limit, floor, layer, neuron) {
    const { anatomy, canvas } = this;
    const space = canvas.parentElement.clientWidth;
    this.cell = Math.min(space / anatomy.columns, 400 / anatomy.rows, 36);
    canvas.style.width = this.cell * anatomy.columns + "px";
    const { context } = prepare(canvas, this.cell * anatomy.rows);
    context.imageSmoothingEnabled = false;
    const image = layerImage(anatomy, anatomy.layer(values, layer), limit, floor, 1);
    context.drawImage(image, 0, 0, this.cell * anatomy.columns, this.cell * anatomy.rows);
    context.strokeStyle = colour.of("--line");
    context.strokeRect(0.5, 0.5, this.cell * anatomy.columns - 1, this.cell * anatomy.rows - 1);
    if (neuron === null || neuron >= anatomy.widths[layer]) return;
    const x = (neuron % anatomy.columns) * this.cell;
    const y = Math.floor(neuron / anatomy.columns) * this.cell;
    const grow = Math.max(0, (9 - this.cell) / 2);
    context.strokeStyle = colour.of("--focus");
    context.lineWidth = 2;
    context.strokeRect(x - grow, y - grow, this.cell + 2 * grow, this.cell + 2 * grow);
  }

  at(x, y, layer) {
    const column = Math.floor(x / this.cell);
    const row = Math.floor(y / this.cell);
    if (column < 0 || column >= this.anatomy.columns || row < 0 || row >= this.anatomy.rows) return null;
    const neuron = row * this.anatomy.columns + column;
    return neuron < this.anatomy.widths[layer] ? neuron : null;
  }
}

// Key neurons per layer as small bars; the current layer stands out.
function drawProfile(canvas, counts, layer) {
  const { context, width, height } = prepare(canvas, 52);
  const top = Math.max(1, ...counts);
  const step = width / counts.length;
  counts.forEach((count, l) => {
    const tall = (count / top) * (height - 18);
    context.fillStyle = colour.of(l === layer ? "--focus" : "--bar");
    context.fillRect(l * step + step * 0.12, height - 16 - tall, step * 0.76, Math.max(tall, count ? 1.5 : 0));
  });
  context.fillStyle = colour.of("--quiet");
  context.font = "10px system-ui, sans-serif";
  context.fillText(`key neurons per layer (most: ${Math.max(...counts).toLocaleString("en")})`, 0, height - 4);
}
