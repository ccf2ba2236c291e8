// The text that was read, its time course, and the player that walks through it token by token.

const LIMIT = 3; // standard deviations at which the colour of a token is full

class Player {
  constructor(app) {
    this.app = app;
    this.text = byId("text");
    this.course = byId("course");
    this.strip = byId("strip");
    this.tokens = [];
    this.trace = null;
    this.timer = 0;
    this.wire();
  }

  wire() {
    const { app } = this;
    const runs = byId("run");
    DATA.runs.forEach((run, i) => runs.add(new Option(`${run.name} (${run.of.toLocaleString("en")} tokens)`, i)));
    runs.addEventListener("change", () => app.set({ run: Number(runs.value), token: 0 }));
    byId("token").addEventListener("input", (event) => app.set({ token: Number(event.target.value) }));
    byId("back").addEventListener("click", () => this.step(-1));
    byId("forward").addEventListener("click", () => this.step(1));
    byId("play").addEventListener("click", () => this.toggle());
    byId("movie").addEventListener("change", (event) => app.set({ movie: event.target.checked }));
    byId("movie-label").textContent = app.source.volumeName;
    this.course.addEventListener("click", (event) => {
      const share = event.offsetX / this.course.clientWidth;
      app.set({ token: Math.max(0, Math.min(this.n - 1, Math.floor(share * this.n))) });
    });
    this.text.addEventListener("click", (event) => {
      const token = event.target.closest("[data-at]");
      if (token) app.set({ token: Number(token.dataset.at) });
    });
    this.text.addEventListener("keydown", (event) => this.key(event));
    DATA.names.forEach((name, k) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.addEventListener("click", () => app.set({ network: k }));
      this.strip.append(button);
    });
  }

  key(event) {
    const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -this.n, End: this.n }[event.key];
    if (jump !== undefined) this.step(jump);
    else if (event.key === " ") this.toggle();
    else return;
    event.preventDefault();
  }

  step(by) {
    this.app.set({ token: Math.max(0, Math.min(this.n - 1, this.app.state.token + by)) });
  }

  toggle(on = !this.timer) {
    clearTimeout(this.timer);
    this.timer = 0;
    byId("play").setAttribute("aria-pressed", String(on));
    byId("play").textContent = on ? "Pause" : "Play";
    byId("now").setAttribute("aria-live", on ? "off" : "polite");
    if (on) {
      if (this.app.state.token >= this.n - 1) this.app.set({ token: 0 });
      this.tick();
    }
  }

  tick() {
    this.timer = setTimeout(async () => {
      if (!this.timer) return;
      if (this.app.state.token >= this.n - 1) return this.toggle(false);
      this.step(1);
      await this.app.drawn; // a slow machine plays slower, it does not pile up frames
      if (this.timer) this.tick();
    }, 1000 / Number(byId("speed").value));
  }

  async load(run) {
    this.record = await this.app.source.run(run);
    this.courses = await this.app.source.courses(run);
    this.n = this.record.n;
    byId("token").max = this.n - 1;
    byId("run").value = run;
    const spans = this.record.tokens.map((token, i) => {
      const span = document.createElement("span");
      span.dataset.at = i;
      span.textContent = token === "" ? "·" : token.replace(/\n/g, "↵\n");
      return span;
    });
    this.text.replaceChildren(...spans);
    if (this.n < this.record.of) {
      const rest = document.createElement("em");
      rest.textContent = ` … ${(this.record.of - this.n).toLocaleString("en")} more tokens are not in this page`;
      this.text.append(rest);
    }
    this.tokens = spans;
  }

  colourText(network) {
    const course = this.courses[network];
    this.tokens.forEach((span, i) => {
      const value = course ? course[i] : 0;
      span.style.backgroundColor = Math.abs(value) < 0.3 ? "" : colour.css(value, LIMIT);
      span.style.color = Math.abs(value) < 0.3 ? "" : colour.ink(value, LIMIT);
    });
  }

  // The recorded series of the chosen neuron, where there is a server to ask.
  async follow({ run, layer, neuron }) {
    const exists = neuron !== null && neuron < this.app.anatomy.widths[layer];
    this.trace = exists ? await this.app.source.series(run, layer, neuron) : null;
    this.traceName = exists ? `line: layer ${layer}, neuron ${neuron.toLocaleString("en")}` : "";
  }

  drawTrace(context, x, height) {
    const top = Math.max(...this.trace.map(Math.abs)) || 1;
    context.strokeStyle = colour.of("--ink");
    context.lineWidth = 1.2;
    context.beginPath();
    this.trace.forEach((value, i) => context.lineTo(x(i), 26 + ((top - value) / (2 * top)) * (height - 28)));
    context.stroke();
    context.fillStyle = colour.of("--ink");
    context.font = "10px system-ui, sans-serif";
    context.fillText(`${this.traceName} (at most ${shown(top, 2)})`, 60, height - 4);
  }

  conditionAt(token) {
    const found = this.record.conditions.find(([from, to]) => token >= from && token < to);
    return found ? found[2] : null;
  }

  showToken(network, token) {
    this.text.querySelector(".here")?.classList.remove("here");
    const span = this.tokens[token];
    if (!span) return;
    span.classList.add("here");
    const panel = this.text.getBoundingClientRect();
    const box = span.getBoundingClientRect();
    if (box.top < panel.top + 8 || box.bottom > panel.bottom - 8) {
      this.text.scrollTop += box.top - panel.top - panel.height / 3;
    }
    byId("token").value = token;
    byId("token-value").textContent = `${token} of ${this.n}`;
    const course = this.courses[network];
    const kind = this.conditionAt(token);
    const text = this.record.tokens[token];
    const word = text ? JSON.stringify(text) : "(no characters)";
    const active = course ? ` · ${DATA.names[network]} ${shown(course[token], 2)} SD` : "";
    byId("now").textContent = `token ${token}: ${word}${active}${kind ? ` · condition ${kind}` : ""}`;
    [...this.strip.children].forEach((button, k) => {
      const value = this.courses[k] ? this.courses[k][token] : 0;
      button.style.backgroundColor = colour.css(value, LIMIT);
      button.style.color = colour.ink(value, LIMIT);
      button.setAttribute("aria-pressed", String(k === network));
      button.title = `${DATA.names[k]}: ${shown(value, 2)} SD`;
    });
  }

  drawCourse(network, token) {
    const { context, width, height } = prepare(this.course, 124);
    const course = this.courses[network] || new Float32Array(this.n);
    let reach = 2;
    for (const value of course) reach = Math.max(reach, Math.abs(value));
    const y = (value) => 26 + ((reach - value) / (2 * reach)) * (height - 28);
    const x = (i) => ((i + 0.5) / this.n) * width;
    this.drawConditions(context, x, width);
    context.strokeStyle = colour.of("--line");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(0, y(0));
    context.lineTo(width, y(0));
    context.stroke();
    for (const [sign, name] of [[1, "--positive"], [-1, "--negative"]]) {
      context.fillStyle = colour.of(name);
      context.beginPath();
      context.moveTo(x(0), y(0));
      course.forEach((value, i) => context.lineTo(x(i), y(Math.max(0, sign * value) * sign)));
      context.lineTo(x(this.n - 1), y(0));
      context.fill();
    }
    if (this.trace) this.drawTrace(context, x, height);
    context.fillStyle = colour.of("--focus");
    context.fillRect(x(token) - 1, 24, 2, height - 24);
    context.fillStyle = colour.of("--quiet");
    context.font = "10px system-ui, sans-serif";
    context.textAlign = "left";
    context.fillText(`+${shown(reach, 1)} SD`, 2, 34);
    context.fillText(`−${shown(reach, 1)} SD`, 2, height - 4);
  }

  drawConditions(context, x, width) {
    const kinds = [...new Set(this.record.conditions.map(([, , kind]) => kind))].sort();
    const step = width / this.n;
    let free = 0;
    context.font = "10px system-ui, sans-serif";
    for (const [from, to, kind] of this.record.conditions) {
      const left = x(from) - step / 2;
      context.fillStyle = CONDITION_COLOURS[kinds.indexOf(kind) % CONDITION_COLOURS.length];
      context.fillRect(left, 0, Math.max(1, (to - from) * step - 1), 8);
      context.fillStyle = colour.of("--quiet");
      if (left >= free && (to - from) * step > 6 * kind.length) {
        context.fillText(kind, left + 2, 19);
        free = left + 6 * kind.length;
      }
    }
  }
}

const CONDITION_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195", "#6B7A87"];
