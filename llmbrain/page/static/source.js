// Where the numbers come from: blobs in this page, or the server of `llmbrain view`.

const byId = (id) => document.getElementById(id);
const dataElement = byId("llmbrain-data");
const DATA = dataElement ? JSON.parse(dataElement.textContent) : null;

// One signed byte a value; the codebook says what each code stands for.
function table(book) {
  const values = new Float32Array(256);
  for (let code = -127; code <= 127; code++) {
    values[code & 255] = Math.sign(code) * book[Math.abs(code)];
  }
  return values;
}

async function inflate(text) {
  const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function remember(make) {
  const kept = new Map();
  return (key) => {
    if (!kept.has(key)) kept.set(key, make(key));
    return kept.get(key);
  };
}

function pageSource(data) {
  const mapValues = data.maps ? table(data.maps.book) : null;
  const courseValues = data.courses ? table(data.courses.book) : null;
  const read = (name) => inflate(byId("blob-" + name).textContent);
  const codes = remember((k) => read("map-" + k));
  const decode = (bytes, values) => Float32Array.from(bytes, (code) => values[code]);

  const map = async (k) => decode(await codes(k), mapValues);
  const courses = remember(async (run) => {
    const flat = decode(await read("course-" + run), courseValues);
    const n = data.runs[run].n;
    return data.names.map((_, k) => flat.subarray(k * n, (k + 1) * n));
  });
  // The model at one token as its networks explain it: the sum of maps (but what is hidden), each times its activity.
  const volume = async (run, token, floor) => {
    const activity = (await courses(run)).map((course) => course[token]);
    const sum = new Float32Array(data.space.widths.reduce((a, b) => a + b, 0));
    for (let k = 0; k < activity.length; k++) {
      const bytes = await codes(k);
      const scaled = mapValues.map((value) => (Math.abs(value) < floor ? 0 : value * activity[k]));
      for (let i = 0; i < sum.length; i++) sum[i] += scaled[bytes[i]];
    }
    return { values: sum, unit: "sum" };
  };
  const run = async (index) => data.runs[index];
  return { map, courses, volume, run, volumeName: "Show the whole model at this token (sum of its networks)" };
}

function serverSource(data) {
  const get = async (path) => {
    const response = await fetch(path);
    if (!response.ok) throw new Error((await response.text()) || response.statusText);
    return response;
  };
  const floats = async (path) => new Float32Array(await (await get(path)).arrayBuffer());
  const map = remember((k) => floats("api/map?network=" + k));
  const run = remember(async (index) => (await get("api/run?run=" + index)).json());
  const courses = remember(async (index) => {
    if (!data.runs[index].courses) return [];
    const [{ n }, flat] = await Promise.all([run(index), floats("api/courses?run=" + index)]);
    return data.names.map((_, k) => flat.subarray(k * n, (k + 1) * n));
  });
  const volume = async (index, token) => {
    const response = await get("api/volume?run=" + index + "&token=" + token);
    const scale = Number(response.headers.get("X-Scale"));
    return { values: new Float32Array(await response.arrayBuffer()), scale, unit: "activation" };
  };
  const series = (index, layer, neuron) => floats(`api/series?run=${index}&layer=${layer}&neuron=${neuron}`);
  return { map, courses, volume, series, run, volumeName: "Show what was recorded at this token" };
}
