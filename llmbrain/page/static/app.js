// The state of the viewer, what changes it, and what is drawn again then.

class App {
  constructor() {
    this.source = DATA.source === "server" ? serverSource(DATA) : pageSource(DATA);
    this.state = { network: 0, layer: 0, neuron: null, run: 0, token: 0, floor: 2, view: "slices", movie: false };
    this.drawn = Promise.resolve();
    this.wanted = new Set();
    this.anatomy = new Anatomy(DATA.space);
    this.overview = new Overview(byId("overview"), this.anatomy);
    this.slice = new Slice(byId("slice"), this.anatomy);
    this.player = byId("text") && DATA.runs.length ? new Player(this) : null;
    this.limit = 1;
    if (!DATA.names.length) {
      this.state.movie = true; // nothing but the recording itself to show
      for (const element of document.querySelectorAll(".needs-networks")) element.hidden = true;
    }
    this.wire();
  }

  // Change the state; draw once, after everything that changes together has changed.
  set(changes) {
    const before = { ...this.state };
    Object.assign(this.state, changes);
    if (changes.network !== undefined && changes.network !== before.network) this.state.layer = this.peak();
    for (const name of Object.keys(changes)) if (before[name] !== this.state[name]) this.wanted.add(name);
    if (!this.wanted.size) return;
    this.drawn = this.drawn.then(() => this.draw()).catch((error) => this.fail(error));
  }

  // The layer that holds most of the network.
  peak() {
    const counts = DATA.profiles?.[this.state.network];
    return counts ? counts.indexOf(Math.max(...counts)) : this.state.layer;
  }

  fail(error) {
    byId("readout").textContent = String(error.message || error);
    console.error(error);
  }

  wire() {
    const pick = byId("pick");
    DATA.names.forEach((name, k) => pick.add(new Option(name, k)));
    pick.addEventListener("change", () => this.set({ network: Number(pick.value) }));
    const turn = (by) => this.set({ network: (this.state.network + by + DATA.names.length) % DATA.names.length });
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    byId("layer").max = this.anatomy.layers - 1;
    byId("layer").addEventListener("input", (event) => this.set({ layer: Number(event.target.value) }));
    byId("floor").addEventListener("input", (event) => this.set({ floor: Number(event.target.value) }));
    for (const radio of document.querySelectorAll("input[name=view]")) {
      radio.addEventListener("change", () => this.set({ view: radio.value }));
    }
    this.wireMaps();
    for (const button of document.querySelectorAll("[data-layer]")) {
      button.addEventListener("click", () => {
        this.set({ layer: Number(button.dataset.layer), neuron: Number(button.dataset.neuron) });
        byId("slice").focus();
      });
    }
    for (const button of document.querySelectorAll("[data-token]")) {
      button.addEventListener("click", () => this.openToken(button));
    }
    window.addEventListener("hashchange", () => this.route());
    const redraw = () => this.redraw();
    new ResizeObserver(redraw).observe(byId("viewer"));
    night.addEventListener("change", () => {
      colour.refresh();
      redraw();
    });
  }

  wireMaps() {
    const overview = byId("overview");
    const slice = byId("slice");
    overview.addEventListener("click", (event) => {
      const found = this.overview.at(event.offsetX, event.offsetY);
      if (found) this.set({ layer: found.layer, neuron: found.neuron });
    });
    overview.addEventListener("mousemove", (event) => {
      const found = this.overview.at(event.offsetX, event.offsetY);
      this.tip(event, found && found.neuron !== null ? found : null);
    });
    slice.addEventListener("click", (event) => {
      const neuron = this.slice.at(event.offsetX, event.offsetY, this.state.layer);
      if (neuron !== null) this.set({ neuron });
    });
    slice.addEventListener("mousemove", (event) => {
      const neuron = this.slice.at(event.offsetX, event.offsetY, this.state.layer);
      this.tip(event, neuron === null ? null : { layer: this.state.layer, neuron });
    });
    for (const canvas of [overview, slice]) canvas.addEventListener("mouseleave", () => this.tip(null, null));
    slice.addEventListener("keydown", (event) => this.key(event));
    byId("profile").addEventListener("click", (event) => {
      const share = event.offsetX / byId("profile").clientWidth;
      this.set({ layer: Math.min(this.anatomy.layers - 1, Math.floor(share * this.anatomy.layers)) });
    });
  }

  key(event) {
    const { layer, neuron } = this.state;
    const width = this.anatomy.widths[layer];
    const columns = this.anatomy.columns;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -width, End: width }[event.key];
    const turn = { PageUp: -1, PageDown: 1 }[event.key];
    if (by !== undefined && width) {
      const to = neuron === null ? 0 : neuron + by;
      const jump = Math.abs(by) === width;
      if ((to >= 0 && to < width) || jump) this.set({ neuron: Math.max(0, Math.min(width - 1, to)) });
    } else if (turn !== undefined) {
      this.set({ layer: Math.max(0, Math.min(this.anatomy.layers - 1, layer + turn)) });
    } else {
      return;
    }
    event.preventDefault();
  }

  tip(event, place) {
    const tip = byId("tip");
    tip.hidden = !place || !this.values;
    if (tip.hidden) return;
    tip.textContent = this.describe(place.layer, place.neuron);
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    tip.style.transform = `translate(${left}px, ${event.clientY + 16}px)`;
  }

  describe(layer, neuron) {
    const value = this.values[this.anatomy.offsets[layer] + neuron];
    const unit = this.state.movie ? this.unit : "z";
    return `layer ${layer} · neuron ${neuron.toLocaleString("en")} · ${unit} ${shown(value, 2)}`;
  }

  openToken(button) {
    const run = Number(button.dataset.run);
    const token = Number(button.dataset.token);
    if (!this.player || run >= DATA.runs.length || token >= DATA.runs[run].n) {
      button.title = "This place is beyond the text that the page carries.";
      button.classList.add("beyond");
      return;
    }
    this.set({ run, token });
    byId("text").scrollIntoView({ block: "center" });
    byId("text").focus({ preventScroll: true });
  }

  // Go to the page of a network; false where the address names none.
  route(hash = window.location.hash) {
    const found = /^#network-(\d+)$/.exec(hash);
    if (!found || Number(found[1]) >= DATA.names.length) return false;
    this.set({ network: Number(found[1]) });
    byId("networks").scrollIntoView();
    return true;
  }

  redraw() {
    this.wanted.add("size");
    this.drawn = this.drawn.then(() => this.draw()).catch((error) => this.fail(error));
  }

  async draw() {
    const changed = this.wanted;
    this.wanted = new Set();
    if (!changed.size) return;
    const { state, player } = this;
    const any = (...names) => names.some((name) => changed.has(name)) || changed.has("size");
    if (any("network")) this.showPage();
    if (player && (changed.has("run") || !player.record)) {
      await player.load(state.run);
      changed.add("size");
    }
    if (any("network", "movie") || (state.movie && any("run", "token", "floor"))) await this.loadValues();
    if (any("network", "movie", "layer", "floor", "view", "token", "neuron", "run")) this.drawMaps(changed);
    if (player && any("network", "run")) player.colourText(state.network);
    if (player && this.source.series && any("run", "layer", "neuron")) await player.follow(state);
    if (player && any("network", "run", "token")) player.showToken(state.network, state.token);
    if (player && (any("network", "run", "token") || (this.source.series && any("layer", "neuron")))) {
      player.drawCourse(state.network, state.token);
    }
  }

  async loadValues() {
    const { state } = this;
    if (state.movie && this.player) {
      const volume = await this.source.volume(state.run, state.token, state.floor);
      this.values = volume.values;
      this.unit = volume.unit;
      this.limit = volume.scale || 2 * (this.mapLimit || 6);
    } else if (DATA.names.length) {
      this.values = await this.source.map(state.network);
      this.limit = this.mapLimit = this.reach(this.values);
    } else {
      this.values = new Float32Array(this.anatomy.offsets.at(-1));
    }
  }

  // End of the colour scale: what all but one in a thousand neurons stay below, but not less than the threshold.
  reach(values) {
    const sizes = Float32Array.from(values, Math.abs).sort();
    const cutoff = Math.max(0, ...(DATA.cutoffs?.[this.state.network] || []).map((v) => Math.abs(v || 0)));
    return Math.max(sizes[Math.floor(0.999 * (sizes.length - 1))], cutoff, 1e-6);
  }

  drawMaps(changed) {
    const { state, limit, values } = this;
    const floor = state.movie ? 0 : state.floor;
    const only = [...changed].every((name) => name === "neuron" || (name === "token" && !state.movie));
    byId("floor-value").textContent = state.floor.toFixed(1);
    byId("layer").value = state.layer;
    byId("layer-value").textContent = `${state.layer} (0 to ${this.anatomy.layers - 1})`;
    if (changed.has("token") && only && !changed.has("neuron")) return;
    this.slice.draw(values, limit, floor, state.layer, state.neuron);
    const chosen = state.neuron !== null && state.neuron < this.anatomy.widths[state.layer];
    byId("readout").textContent = chosen ? this.describe(state.layer, state.neuron) : " ";
    if (only) return;
    this.overview.draw(values, limit, floor, state.view, state.layer);
    drawLegend(byId("legend"), limit, state.movie ? this.unit : "z");
    if (DATA.profiles) drawProfile(byId("profile"), DATA.profiles[state.network], state.layer);
  }

  // The page of the chosen network.
  showPage() {
    const { network } = this.state;
    byId("pick").value = network;
    document.querySelectorAll("[data-network]").forEach((page, k) => page.classList.toggle("chosen", k === network));
  }

  start() {
    document.documentElement.classList.add("js");
    this.state.layer = this.peak();
    this.route();
    this.wanted.add("network").add("run");
    this.redraw();
  }
}

// The section being read stands out in the navigation.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [id, link] of links) {
        if (id === entry.target.id) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  },
  { rootMargin: "-20% 0px -75% 0px" },
);
for (const id of links.keys()) if (byId(id)) seen.observe(byId(id));

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const element = byId(button.dataset.copy);
    const said = document.querySelector("[data-copied]");
    try {
      await navigator.clipboard.writeText(element.innerText);
      said.textContent = "Copied.";
    } catch {
      // a page opened from a disk may not be allowed to: select it instead
      window.getSelection().selectAllChildren(element);
      said.textContent = "Selected: press Ctrl+C.";
    }
  });
}

const app = DATA && DATA.space && byId("viewer") ? new App() : null;
if (app) app.start();

// In the frame of a notebook a link to a part of this page would load the notebook instead.
if (window.location.href === "about:srcdoc") {
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (!link) return;
    event.preventDefault();
    const hash = link.getAttribute("href");
    if (!app?.route(hash)) byId(hash.slice(1))?.scrollIntoView();
  });
}
