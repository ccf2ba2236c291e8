// Diverging colours centred at zero: blue below, orange above; zero is the page itself, by day and by night.

const RAMPS = {
  light: [[8, 48, 107], [31, 111, 181], [142, 192, 228], [250, 250, 248], [245, 185, 139], [209, 97, 26], [107, 36, 0]],
  dark: [[190, 225, 255], [88, 166, 230], [28, 78, 128], [22, 27, 33], [122, 62, 20], [232, 129, 58], [255, 214, 178]],
};
const night = window.matchMedia("(prefers-color-scheme: dark)");

// 511 entries: index 255 is zero.
function makeRamp(stops) {
  const out = new Uint8Array(511 * 3);
  for (let i = 0; i < 511; i++) {
    const place = (i / 510) * (stops.length - 1);
    const left = Math.min(Math.floor(place), stops.length - 2);
    for (let c = 0; c < 3; c++) {
      out[3 * i + c] = stops[left][c] + (place - left) * (stops[left + 1][c] - stops[left][c]);
    }
  }
  return out;
}

const colour = {
  ramp: makeRamp(RAMPS[night.matches ? "dark" : "light"]),
  refresh() {
    this.ramp = makeRamp(RAMPS[night.matches ? "dark" : "light"]);
  },
  index(value, limit) {
    const x = Math.max(-1, Math.min(1, value / limit));
    return 3 * (255 + Math.round(255 * x));
  },
  css(value, limit) {
    const i = this.index(value, limit);
    return `rgb(${this.ramp[i]} ${this.ramp[i + 1]} ${this.ramp[i + 2]})`;
  },
  // Text that can be read on the colour of this value.
  ink(value, limit) {
    const i = this.index(value, limit);
    const light = 0.299 * this.ramp[i] + 0.587 * this.ramp[i + 1] + 0.114 * this.ramp[i + 2];
    return light > 140 ? "#101418" : "#ffffff";
  },
  of(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  },
};

// A canvas as sharp as the screen: returns its context in CSS pixels, and its size.
function prepare(canvas, height) {
  const width = canvas.clientWidth || canvas.parentElement.clientWidth;
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  canvas.style.height = height + "px";
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height, ratio };
}

function drawLegend(canvas, limit, unit) {
  const { context, width, height } = prepare(canvas, 34);
  const left = 4;
  const span = width - 8;
  for (let x = 0; x < span; x++) {
    context.fillStyle = colour.css((2 * x) / (span - 1) - 1, 1);
    context.fillRect(left + x, 2, 1.5, 10);
  }
  context.fillStyle = colour.of("--quiet");
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "top";
  const ends = [[left, "left", -limit], [left + span / 2, "center", 0], [left + span, "right", limit]];
  for (const [x, align, value] of ends) {
    context.textAlign = align;
    context.fillText(value === 0 ? `${unit} 0` : shown(value, 1), x, 17);
  }
}

function shown(value, digits) {
  return value.toFixed(digits).replace("-", "−");
}
