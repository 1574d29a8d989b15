/* The form around `panels`: what is asked, the queue, and the saved page. Every text goes through textContent. */
const $ = id => document.getElementById(id);
const page = {src: null, scene: null, view: null, asked: null, waiting: null, offer: null};
const FIRST = ['mi', 'similarity', 'attention'];
const make = (tag, parent, props = {}) => parent.appendChild(Object.assign(document.createElement(tag), props));
const guarded = work => async event => {
  $('error').textContent = '';
  try { return await work(event); } catch (error) { if (error.name !== 'AbortError') $('error').textContent = error.message; }
};

async function get(path) {
  const reply = await fetch(path), got = await reply.json();
  if (got.error) throw new Error(got.error);
  return got;
}

function loads(src) {
  return new Promise((done, fail) => {
    const image = new Image();
    image.onload = () => done(src);
    image.onerror = () => fail(new Error('this cannot be read as an image: give a PNG, JPEG, WebP, BMP or GIF file'));
    image.src = src;
  });
}

async function showScene(index) {
  const got = await get(`scene/${index}`);
  Object.assign(page, {src: got.src, scene: index});
  $('preview').src = got.src;
  $('warning').textContent = '';
  $('file').value = '';
  $('asked').replaceChildren(...got.questions.map(one => new Option(one.answer, one.text)));
  $('known').replaceChildren();
  for (const one of got.questions) {
    const button = make('button', make('li', $('known')), {type: 'button', textContent: `${one.text} ${one.answer}`});
    button.onclick = () => { $('question').value = one.text; };
  }
  $('question').value = (got.questions.find(one => one.text.startsWith('What color')) || got.questions[0]).text;
  $('second').value = '';
}

async function showFile(file) {
  if (!file) return;
  if (file.size > page.offer.max_bytes) throw new Error(`an image file of more than ${page.offer.max_bytes / 2 ** 20} MiB: make it smaller`);
  const src = await new Promise((done, fail) => { const reader = new FileReader(); reader.onload = () => done(reader.result); reader.onerror = () => fail(new Error('this file cannot be read')); reader.readAsDataURL(file); });
  await loads(src);
  Object.assign(page, {src, scene: null});
  $('preview').src = src;
  $('scene').value = '';
  $('asked').replaceChildren();
  $('known').replaceChildren();
  warn();
}

function warn() {
  const isDemo = $('model').value.startsWith('demo_');
  $('warning').textContent = page.scene === null && isDemo ? `The demo model has 13.5 M parameters and was trained on rendered scenes only: its answer about a photograph means nothing. For photographs start a real model: ${page.offer.command}` : '';
}

function request() {
  if (!page.src) throw new Error('choose an image first');
  const pruners = {};
  for (const box of document.querySelectorAll('input[name=pruner]:checked')) {
    pruners[box.value] = {};
    for (const input of document.querySelectorAll(`[data-pruner=${box.value}]`)) pruners[box.value][input.name] = input.value;
  }
  return {
    ...(page.scene === null ? {image: page.src} : {scene: page.scene}), model: $('model').value, pruners,
    questions: [$('question').value, $('second').value].filter((text, k) => k === 0 || text.trim()),
    budgets: $('budgets').value.split(/[\s,;]+/).filter(Boolean),
  };
}

async function ask(asked, tell) {  // the reply is a line of JSON for each thing that happens
  const waiting = new AbortController();
  page.waiting = waiting;
  const reply = await fetch('ask', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(asked), signal: waiting.signal});
  if (!reply.ok) throw new Error((await reply.json()).error);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = '', got = await reader.read(); !got.done; got = await reader.read()) {
    const lines = (held + got.value).split('\n');
    held = lines.pop();
    for (const line of lines) {
      const said = JSON.parse(line);
      if (said.error) throw new Error(said.error);
      if (said.view) return said.view;
      tell(said);
    }
  }
  throw new Error('the server ended without an answer: ask again');
}

const progress = said => { $('state').textContent = said.place ? `${said.place} ${said.place === 1 ? 'visitor' : 'visitors'} before you …` : said.n ? `panel ${Math.min(said.done + 1, said.n)} of ${said.n} …` : 'encoding the image …'; };

async function choose(n) {  // methods without an order are asked again at n tokens
  if (page.waiting) page.waiting.abort();
  const pruners = Object.fromEntries(Object.entries(page.asked.pruners).filter(([name]) => page.view.questions[0].runs.some(run => run.pruner === name && !run.order && !run.error)));
  try { return await ask({...page.asked, pruners, budgets: [String(n)]}, progress); } catch (error) { if (error.name !== 'AbortError') $('error').textContent = error.message; return null; } finally { $('state').textContent = ''; }
}

const submit = guarded(async event => {
  event.preventDefault();
  if (page.waiting) page.waiting.abort();
  const asked = request(), start = performance.now();
  $('go').disabled = true;
  $('cancel').hidden = false;
  $('state').textContent = 'asking …';
  let told = '';
  try {
    page.view = await ask(asked, progress);
    page.asked = asked;
    panels($('shown'), page.view, {choose});
    $('save').disabled = false;
    const n = page.view.questions.reduce((sum, one) => sum + one.runs.length, 0);
    told = `${n} panels in ${((performance.now() - start) / 1000).toFixed(1)} s`;
  } catch (error) {
    if (error.name === 'AbortError') told = 'cancelled';
    throw error;
  } finally {
    $('go').disabled = false;
    $('cancel').hidden = true;
    $('state').textContent = told;
    page.waiting = null;
  }
});

async function save() {
  const template = await (await fetch('saved.html')).text(), data = JSON.stringify(page.view).replaceAll('<', '\\u003c');
  const url = URL.createObjectURL(new Blob([template.replace('"__DATA__"', () => data)], {type: 'text/html'}));
  Object.assign(document.createElement('a'), {href: url, download: 'mi-pruner.html'}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function addPruner([name, {title, fields}]) {
  const isFirst = FIRST.includes(name), line = make('div', isFirst ? $('pruners') : $('more'), {className: 'pruner'}), label = make('label', line);
  make('input', label, {type: 'checkbox', name: 'pruner', value: name, checked: isFirst});
  label.append(` ${title}`);
  if (!fields.length) return;
  const box = make('details', line);
  make('summary', box, {textContent: 'options'});
  for (const field of fields) {
    const row = make('label', box, {textContent: field.name}), value = field.value === null ? 'null' : String(field.value);
    const choices = field.choices.length ? field.choices : typeof field.value === 'boolean' ? ['true', 'false'] : null;
    const input = make(choices ? 'select' : 'input', row, {name: field.name});
    if (choices) input.replaceChildren(...choices.map(choice => new Option(choice, choice)));
    input.value = value;
    input.dataset.pruner = name;
  }
}

guarded(async () => {
  page.offer = await get('offer');
  $('model').replaceChildren(...page.offer.models.map(name => new Option(name, name)));
  const place = ([name]) => FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length;
  Object.entries(page.offer.pruners).sort((a, b) => place(a) - place(b)).forEach(addPruner);
  $('scene').replaceChildren(new Option('–', ''), ...Array.from({length: page.offer.n_scenes}, (_, k) => new Option(`scene ${k}`, k)));
  $('scene').onchange = guarded(() => $('scene').value && showScene(+$('scene').value));
  $('file').onchange = guarded(() => showFile($('file').files[0]));
  $('model').onchange = warn;
  $('form').onsubmit = submit;
  $('cancel').onclick = () => page.waiting && page.waiting.abort();
  $('save').onclick = guarded(save);
  document.onpaste = guarded(event => showFile(event.clipboardData.files[0]));
  document.ondragover = event => event.preventDefault();
  document.ondrop = guarded(event => { event.preventDefault(); return showFile(event.dataTransfer.files[0]); });
  await showScene($('scene').value = 0);
})();
